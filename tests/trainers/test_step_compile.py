"""``engine.compile``: encoder and heads as one graph train as they do without, under the same names."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks
from tests.trainers.small_runs import SmallRun, difference, make_method
from trainers.engine import EngineConfig
from trainers.step import compile_embedding

SETTINGS: dict[str, Any] = {"projector": {"hidden": 16, "output": 8}}
STEPS = 2


def trained(group: dist.ProcessGroup, backend: str | None, accumulation: int) -> dict[str, torch.Tensor]:
    run = SmallRun(group, make_method("simclr", SETTINGS), accumulation=accumulation)
    if backend is not None:
        torch.compile = partial(torch.compile, backend=backend)  # type: ignore[assignment]  # a process of its own
        compile_embedding(run.method, EngineConfig(compile=True, accumulation=accumulation))
    losses = [run.step(number).scalars["loss"] for number in range(STEPS)]
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    return {"frames": torch.tensor(frames), "losses": torch.stack(losses), **run.method.state_dict()}


def both(group: dist.ProcessGroup, backend: str, accumulation: int) -> list[dict[str, torch.Tensor]]:
    return [trained(group, None, accumulation), trained(group, backend, accumulation)]


# eager traces and guards as inductor does, which compiles for a minute; two micro-batches are embedded twice, at first
# without gradient and with frozen statistics
@pytest.mark.parametrize(
    ("backend", "accumulation"),
    [("eager", 2), *(pytest.param("inductor", n, marks=pytest.mark.slow) for n in (1, 2))],
)
def test_compiled_steps_are_those_of_the_plain_method(backend: str, accumulation: int) -> None:
    [[plain, compiled]] = run_ranks(1, both, backend, accumulation, timeout=500)
    assert plain.pop("frames") == 0
    assert compiled.pop("frames") > 0
    assert plain.keys() == compiled.keys()
    for name, value in plain.items():
        assert difference(compiled[name].double(), value.double()) < 1e-9, name


def test_dropout_that_would_not_be_drawn_again_is_refused() -> None:
    method = make_method("probsimclr", {**SETTINGS, "dropout": 0.1})
    compile_embedding(method, EngineConfig(compile=True))
    with pytest.raises(ValueError, match=r"engine\.compile does not go with dropout .* set engine\.accumulation=1"):
        compile_embedding(method, EngineConfig(compile=True, accumulation=2))
