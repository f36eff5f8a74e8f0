"""SimCLR as a method. Its loss with the cosine has its own tests (tests/kernels/test_ntxent.py)."""

import math

import pytest
import torch
from torch import Tensor

from tests.trainers.small_runs import check_ranks_and_micro_batches, check_resumes, make_method, views_of_step
from trainers.parts.pair_softmax import SIMILARITIES, pair_softmax

SETTINGS = {"temperature": 0.5, "projector": {"hidden": 32, "output": 16}}


def similarity_of(name: str, a: list[float], b: list[float]) -> float:
    squared = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return {
        "gaussian": math.exp(-math.sqrt(squared) / 2),
        "sne": math.exp(-squared),
        "student_t": 1 / (1 + squared),
        "student_t_l1": 1 / (1 + sum(abs(x - y) for x, y in zip(a, b, strict=True))),
    }[name]


def loss_of(name: str, z1: Tensor, z2: Tensor, temperature: float) -> float:
    """The formula, pair by pair."""
    rows = [[x / math.hypot(*row) for x in row] for row in torch.cat([z1, z2]).tolist()]
    n, total = len(z1), 0.0
    for i, row in enumerate(rows):
        powers = [math.exp(similarity_of(name, row, other) / temperature) for other in rows]
        total -= math.log(powers[(i + n) % (2 * n)] / (sum(powers) - powers[i]))
    return total / (2 * n)


def pair(n: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return z1, z1 + 0.5 * torch.randn(n, d, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_other_similarities_follow_their_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.parts.pair_softmax._TILE_ROWS", 7)  # tiles that do not divide the rows
    z1, z2 = pair(9, 5)
    loss, hits = pair_softmax(z1, z2, similarity=name, temperature=0.1)
    assert loss.item() == pytest.approx(loss_of(name, z1, z2, 0.1), rel=1e-12)
    assert hits.shape == (18,)
    single, _ = pair_softmax(z1.float(), z2.float(), similarity=name, temperature=0.1)
    assert single.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", SIMILARITIES)
def test_other_similarities_have_the_gradient_of_finite_differences(name: str) -> None:
    z1, z2 = (z.requires_grad_() for z in pair(4, 3))
    assert torch.autograd.gradcheck(
        lambda a, b: pair_softmax(a, b, similarity=name, temperature=0.3)[0], (z1, z2), atol=1e-8
    )


@pytest.mark.parametrize("name", SIMILARITIES)
def test_equal_views_give_a_finite_gradient_and_hits(name: str) -> None:
    z = pair(6, 4)[0].float().requires_grad_()
    loss, hits = pair_softmax(z, z.clone(), similarity=name, temperature=0.1)
    loss.backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert hits.all(), "each row's partner is itself again"
    same = torch.ones(6, 4)
    _, hits = pair_softmax(same, same, similarity=name, temperature=0.1)
    assert not hits.any(), "a tie is no hit"


def test_the_method_uses_the_similarity_it_is_told() -> None:
    batch = views_of_step(0, torch.float64)
    method = make_method("simclr", SETTINGS | {"similarity": "student_t"})
    embeddings = method.embed(batch.views)
    loss = method.loss(embeddings, batch, None)["loss"].item()
    assert loss == pytest.approx(loss_of("student_t", *embeddings["z"].detach(), 0.5), rel=1e-9)


def test_ranks_and_micro_batches_change_nothing() -> None:
    check_ranks_and_micro_batches("simclr", [SETTINGS | {"similarity": s} for s in ("cosine", "gaussian")])


def test_resumes_to_the_bit() -> None:
    check_resumes("simclr", SETTINGS)
