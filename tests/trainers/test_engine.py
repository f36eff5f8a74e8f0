"""Ranks and micro-batches must change nothing: loss, gradients and weights against one process with the whole batch."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.trainers.small_runs import (
    LR,
    STEPS,
    SmallRun,
    difference,
    make_method,
    micro_batches,
    parameters,
    views_of_step,
)

SETTINGS = {"temperature": 0.5, "projector": {"hidden": 32, "output": 16}}


def train(group: dist.ProcessGroup | None, dtype: torch.dtype, **engine: Any) -> dict[str, torch.Tensor]:
    """Losses of STEPS steps, the first step's gradients, and the weights and buffers at the end."""
    run = SmallRun(group, make_method("simclr", SETTINGS, dtype=dtype), **engine)
    method, ranks = run.method, run.ranks
    first = micro_batches(views_of_step(0, dtype), ranks, 1)[0]
    loss = method.loss(method.embed(first.views), first, ranks.group)["loss"]
    gradients = torch.autograd.grad(loss, list(method.parameters()))
    for gradient in gradients:  # by hand: what the engine has to do as well
        dist.all_reduce(gradient)
        gradient /= ranks.world_size
    start = parameters(method)
    losses = [run.step(step).scalars["loss"] for step in range(STEPS)]
    run.engine.average_running_statistics()
    return {
        "start": start,
        "loss": torch.stack(losses).double(),
        "gradient": torch.cat([g.flatten().double() for g in gradients]),
        "weights": parameters(method),
        "statistics": torch.cat([b.detach().flatten().double() for b in method.buffers()]),
    }


CASES: dict[str, dict[str, Any]] = {
    f"{optimizer} {batchnorm} {str(dtype)[6:]}": {
        "optimizer": optimizer,
        "dtype": dtype,
        "batchnorm": batchnorm,
    }
    for optimizer in ("sgd", "lars")
    for batchnorm in ("sync", "frozen")
    for dtype in (torch.float32, torch.float64)
}
FROZEN = {"optimizer": "sgd", "dtype": torch.float64, "batchnorm": "frozen"}
CASES |= {
    "micro-batches": FROZEN | {"accumulation": 3},
    "micro-batches, lars": FROZEN | {"optimizer": "lars", "accumulation": 2},
    "micro-batches, clipping": FROZEN | {"accumulation": 2, "clipping": 0.02},
    "clipping": FROZEN | {"clipping": 0.02},
    "local": {"optimizer": "sgd", "dtype": torch.float32, "batchnorm": "local"},
    "zero 1": FROZEN | {"dtype": torch.float32, "zero_stage": 1},
    "zero 2": FROZEN | {"dtype": torch.float32, "zero_stage": 2, "accumulation": 2},
}


def train_cases(group: dist.ProcessGroup) -> dict[str, dict[str, torch.Tensor]]:
    return {name: train(group, **case) for name, case in CASES.items()} | {"idle": {"weight": train_idle(group)}}


def train_idle(group: dist.ProcessGroup) -> torch.Tensor:
    """A weight that the loss does not depend on."""
    method = make_method("simclr", SETTINGS)
    method.idle = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    run = SmallRun(group, method)
    for step in range(STEPS):
        run.step(step)
    return method.idle.detach()


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, dict[str, torch.Tensor]]]]:
    """All cases by number of ranks; one start-up of DeepSpeed for all of them."""
    return {world_size: run_ranks(world_size, train_cases, timeout=280) for world_size in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_weight_without_gradient_decays(results: Any, world_size: int) -> None:
    weight, velocity = 1.0, 0.0
    for _ in range(STEPS):
        velocity = 0.9 * velocity + 1e-3 * weight  # momentum, weight decay
        weight -= LR * velocity
    for rank in results[world_size]:
        assert torch.allclose(rank["idle"]["weight"], torch.full((2, 2), weight, dtype=torch.float64), rtol=1e-12)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith(("sgd", "lars"))])
def test_two_ranks_equal_one(results: Any, case: str) -> None:
    """Frozen BatchNorm: 1e-5 in float32, 1e-9 in float64. Synchronised: 1e-9 in float64.

    Synchronised in float32, only the first loss is comparable: sums in another order move activations by an ulp,
    and one that crosses a ReLU's kink moves the gradient by about 1e-3 whatever the code does.
    """
    one, two = results[1][0][case], [rank[case] for rank in results[2]]
    for name in ("loss", "gradient", "weights", "statistics"):
        assert torch.equal(two[0][name], two[1][name]), f"{name} differs between the ranks"
    if case.endswith("sync float32"):
        assert two[0]["loss"][0].item() == pytest.approx(one["loss"][0].item(), rel=1e-6)
        return
    tolerance = 1e-5 if case.endswith("float32") else 1e-9
    for name in ("loss", "gradient", "weights", "statistics"):
        assert difference(two[0][name], one[name]) < tolerance, name
    assert difference(one["weights"], results[1][0][case]["start"]) > 1e-4, "nothing was trained"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("micro", "whole"),
    [
        ("micro-batches", "sgd frozen float64"),
        ("micro-batches, lars", "lars frozen float64"),
        ("micro-batches, clipping", "clipping"),
    ],
)
def test_micro_batches_equal_one_batch(results: Any, world_size: int, micro: str, whole: str) -> None:
    for name in ("loss", "weights"):
        assert difference(results[world_size][0][micro][name], results[1][0][whole][name]) < 1e-9, name


def test_clipping_acts(results: Any) -> None:
    assert difference(results[1][0]["clipping"]["weights"], results[1][0]["sgd frozen float64"]["weights"]) > 1e-3


def test_zero_equals_stage_0(results: Any) -> None:
    plain = results[1][0]["sgd frozen float32"]
    for stage in ("zero 1", "zero 2"):
        for name in ("loss", "weights"):
            assert difference(results[2][0][stage][name], plain[name]) < 1e-5, (stage, name)


def test_local_batchnorm_differs_from_synchronised(results: Any) -> None:
    assert difference(results[2][0]["local"]["weights"], results[2][0]["sgd sync float32"]["weights"]) > 1e-4
    ranks = [rank["local"]["statistics"] for rank in results[2]]
    assert torch.equal(ranks[0], ranks[1]), "average_running_statistics must make the ranks agree"
