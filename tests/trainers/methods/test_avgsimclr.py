"""AVGSimCLR: its three pairings against their formulas, and the embedding of one pair at a time."""

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.views import View
from tests.distributed import run_ranks
from tests.trainers.small_runs import (
    BATCH,
    SmallRun,
    check_ranks_and_micro_batches,
    check_resumes,
    make_method,
    views_of_step,
)
from trainers.methods.avgsimclr import Config

SETTINGS = {"temperature": 0.3, "projector": {"hidden": 32, "output": 16}}
PAIRINGS = ("pairs", "all_pairs", "shared")


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def ntxent_of(z1: Tensor, z2: Tensor, t: float) -> float:
    rows, n = torch.cat([z1, z2]), len(z1)
    losses = []
    for i in range(2 * n):
        powers = [math.exp(cosine(rows[i], rows[j]) / t) if j != i else 0.0 for j in range(2 * n)]
        losses.append(-math.log(powers[(i + n) % (2 * n)] / sum(powers)))
    return sum(losses) / len(losses)


def supcon_of(z: Tensor, t: float) -> float:
    """Equation 2 of arXiv:2004.11362 (L_out), the image as the class."""
    views, n = z.shape[:2]
    rows = z.flatten(0, 1)
    losses = []
    for i in range(views * n):
        powers = [math.exp(cosine(rows[i], rows[j]) / t) if j != i else 0.0 for j in range(views * n)]
        positives = [j for j in range(views * n) if j != i and j % n == i % n]
        losses.append(-sum(math.log(powers[p] / sum(powers)) for p in positives) / len(positives))
    return sum(losses) / len(losses)


def loss_of(pairing: str, z: Tensor, t: float) -> float:
    if pairing == "shared":
        return supcon_of(z, t)
    pairs = (
        list(combinations(range(len(z)), 2)) if pairing == "all_pairs" else [(v, v + 1) for v in range(0, len(z), 2)]
    )
    return sum(ntxent_of(z[a], z[b], t) for a, b in pairs) / len(pairs)


def loss(pairing: str, z: Tensor, t: float = 0.3) -> Tensor:
    method = make_method("avgsimclr", SETTINGS | {"pairing": pairing, "temperature": t}, views=len(z))
    return method.loss({"z": z}, views_of_step(0, z.dtype), None)["loss"]


@pytest.mark.parametrize("views", [2, 4, 6])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_loss_follows_its_formula(pairing: str, views: int) -> None:
    z = torch.randn(views, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(views))
    assert loss(pairing, z).item() == pytest.approx(loss_of(pairing, z, 0.3), rel=1e-11)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_gradient_is_that_of_finite_differences(pairing: str) -> None:
    z = torch.randn(4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: loss(pairing, rows), (z,), atol=1e-8)


def test_with_two_views_all_pairings_are_simclr() -> None:
    z = torch.randn(2, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = [loss(pairing, z).item() for pairing in PAIRINGS]
    assert values == pytest.approx([ntxent_of(*z, 0.3)] * 3, rel=1e-11)


def one_step(group: Any, pairing: str) -> tuple[list[int], Tensor]:
    """The numbers of images that the encoder saw in each forward pass of a step, and the loss."""
    method = make_method("avgsimclr", SETTINGS | {"pairing": pairing}, views=4)
    run, seen = SmallRun(group, method), []
    method.encoder.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    return seen, run.step(0, views=4).scalars["loss"]


def steps(group: Any) -> dict[str, tuple[list[int], Tensor]]:
    return {pairing: one_step(group, pairing) for pairing in PAIRINGS}


def test_the_encoder_sees_one_pair_at_a_time() -> None:
    [results] = run_ranks(1, steps)
    for pairing, (seen, value) in results.items():
        # Coupled pairings need all embeddings before the first gradient: every pair goes through twice.
        assert seen == [2 * BATCH] * (2 if pairing == "pairs" else 4), pairing
        method = make_method("avgsimclr", SETTINGS | {"pairing": pairing}, views=4).train()
        views = views_of_step(0, torch.float64, 4).views
        z = torch.cat([method.embed(views[:2])["z"], method.embed(views[2:])["z"]]).detach()
        assert value.item() == pytest.approx(loss_of(pairing, z, 0.3), rel=1e-9)


def test_ranks_and_micro_batches_change_nothing() -> None:
    check_ranks_and_micro_batches("avgsimclr", [SETTINGS | {"pairing": p} for p in PAIRINGS], views=4)


def test_resumes_to_the_bit() -> None:
    check_resumes("avgsimclr", SETTINGS | {"pairing": "shared"}, views=4)


def test_odd_numbers_of_views_are_refused() -> None:
    Config().check_views((View(),) * 4)
    with pytest.raises(ValueError, match=r"3 views .* set views\.repeat=2"):
        Config().check_views((View(),) * 3)
    with pytest.raises(ValueError, match=r"batch_size=1 is too small for method\.name=.*at least 2"):
        Config().check(images=10, batch_size=1, image_size=32)
