"""A few steps of any method, on one rank or several, in a second: for what must not depend on how a run is cut up."""

from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

from pipelines.batch import ViewBatch
from pipelines.views import View
from tests.distributed import run_ranks
from trainers.engine import Engine, EngineConfig, Ranks, prepare_module
from trainers.methods import BaseMethod, Facts, build_method, find_method
from trainers.optim import OptimConfig, build_optimizer
from trainers.state import load_strict
from trainers.step import StepResult, train_step

BATCH, STEPS, LR = 24, 5, 0.01
Result = dict[str, Any]


class SmallEncoder(nn.Sequential):
    """Convolutions, BatchNorm and ReLU as in a ResNet, at a hundredth of the cost (double convolutions are slow)."""

    features = 32

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


def facts(views: int = 2, **changes: Any) -> Facts:
    settings: dict[str, Any] = {
        "image_size": 8,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "images": BATCH * STEPS,
        "classes": 3,
        "multi_label": False,
        "seed": 0,
        "batch_size": BATCH,
        "steps_per_epoch": STEPS,
        "total_steps": STEPS,
        "plan": (View(crop="random_resized"),) * views,
        "steady": True,
    }
    return Facts(**settings | changes)


def views_of_step(step: int, dtype: torch.dtype, views: int = 2) -> ViewBatch:
    """Handwritten digits and their noisy copies: on random images float32's own noise would hide what is tested."""
    images = torch.from_numpy(load_digits().images)[step * BATCH : (step + 1) * BATCH] / 8 - 1
    noise = torch.randn(views, BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    shown = (images[:, None] + 0.3 * noise).to(dtype)
    return ViewBatch(shown, torch.arange(BATCH) % 3, torch.arange(BATCH) + step * BATCH)


def micro_batches(batch: ViewBatch, ranks: Ranks, accumulation: int) -> list[ViewBatch]:
    share = BATCH // ranks.world_size
    mine = torch.arange(ranks.rank * share, (ranks.rank + 1) * share)
    return [
        ViewBatch(batch.views[:, part], batch.labels[part], batch.indices[part]) for part in mine.chunk(accumulation)
    ]


def make_method(name: str, settings: dict[str, Any], views: int = 2, dtype: torch.dtype = torch.float64) -> BaseMethod:
    """A method by its config's fields, always with the same weights."""
    torch.manual_seed(0)
    config = find_method(name).Config.model_validate({"name": name, **settings})
    return build_method(config, SmallEncoder(), facts(views)).to(dtype)


class SmallRun:
    """A method under the engine, its batches, and what is left of them. Only inside `run_ranks`."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        method: BaseMethod,
        *,
        optimizer: str = "sgd",
        accumulation: int = 1,
        batchnorm: str = "sync",
        zero_stage: int = 0,
        clipping: float = 0.0,
    ) -> None:
        world_size = dist.get_world_size()
        alone = world_size == 1
        control = None if alone else dist.new_group(backend="gloo")
        self.ranks = Ranks(dist.get_rank(), world_size, torch.device("cpu"), None if alone else group, control)
        config = EngineConfig(
            accumulation=accumulation,
            batchnorm="local" if batchnorm == "frozen" else batchnorm,
            zero_stage=zero_stage,
            gradient_clipping=clipping,
        )
        self.method, self.accumulation = prepare_module(method, config, self.ranks), accumulation
        self.dtype = next(method.parameters()).dtype
        built = build_optimizer(OptimConfig(name=optimizer, weight_decay=1e-3), method, LR)
        micro_batch_size = BATCH // world_size // accumulation
        self.engine = Engine(method, built, config, self.ranks, micro_batch_size, method.view_parts)
        method.train()
        if batchnorm == "frozen":
            for module in method.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    def step(self, number: int, views: int = 2) -> StepResult:
        batch = views_of_step(number, self.dtype, views)
        return train_step(self.engine, self.method, micro_batches(batch, self.ranks, self.accumulation), LR)


def train_method(
    group: dist.ProcessGroup | None, name: str, settings: dict[str, Any], views: int = 2, **engine: Any
) -> Result:
    """STEPS steps: the losses, and all parameters and buffers at the end by name, as float64."""
    run = SmallRun(group, make_method(name, settings, views), **engine)
    start = parameters(run.method)
    losses = [run.step(number, views).scalars["loss"] for number in range(STEPS)]
    run.engine.average_running_statistics()
    state = {key: value.detach().double() for key, value in run.method.state_dict().items()}
    return {"loss": torch.stack(losses).double(), "state": state, "start": start, "end": parameters(run.method)}


def train_cases(group: dist.ProcessGroup | None, cases: dict[str, dict[str, Any]]) -> dict[str, Result]:
    return {name: train_method(group, **case) for name, case in cases.items()}


def check_ranks_and_micro_batches(
    name: str,
    settings: dict[str, Any] | list[dict[str, Any]],
    views: int = 2,
    tolerance: float = 1e-9,
    unchanged: tuple[str, ...] = (),
) -> None:
    """Two ranks, and two micro-batches, train as one process with the whole batch: losses, weights and every buffer.

    In float64. Settings must be free of dropout, whose masks are drawn by each rank for itself; a list of settings
    shares the start-up of the processes. ``unchanged`` names buffers that STEPS steps leave as they were; all others
    must have moved.
    """
    several = settings if isinstance(settings, list) else [settings]
    cases: dict[str, dict[str, Any]] = {}
    for number, one_of in enumerate(several):
        whole = {"name": name, "settings": one_of, "views": views}
        frozen = whole | {"batchnorm": "frozen"}
        cases[f"{number} whole"] = whole
        cases[f"{number} frozen"] = frozen
        cases[f"{number} micro"] = frozen | {"accumulation": 2}
    [one] = run_ranks(1, train_cases, cases)
    two = run_ranks(2, train_cases, {key: case for key, case in cases.items() if not key.endswith("frozen")})
    for number, one_of in enumerate(several):
        alone = one[f"{number} whole"]
        for key, value in two[0][f"{number} whole"]["state"].items():
            assert torch.equal(value, two[1][f"{number} whole"]["state"][key]), f"{key} differs between the ranks"
        _check_same(two[0][f"{number} whole"], alone, tolerance, f"{one_of} two ranks")
        expected = one[f"{number} frozen"]
        _check_same(one[f"{number} micro"], expected, tolerance, f"{one_of} micro-batches")
        _check_same(two[0][f"{number} micro"], expected, tolerance, f"{one_of} micro-batches on two ranks")
        assert difference(alone["end"], alone["start"]) > 1e-4, "nothing was trained"
        fresh = make_method(name, one_of, views)
        for key, value in fresh.named_buffers():
            if key not in unchanged and key in alone["state"]:
                assert not torch.equal(value.double(), alone["state"][key]), f"buffer {key} was never changed"


def _check_same(found: Result, expected: Result, tolerance: float, what: str) -> None:
    assert difference(found["loss"], expected["loss"]) < tolerance, f"{what}: loss"
    assert found["state"].keys() == expected["state"].keys()
    for key, value in expected["state"].items():
        assert difference(found["state"][key], value) < tolerance, f"{what}: {key}"


def resume(group: dist.ProcessGroup | None, name: str, settings: dict[str, Any], views: int, at: int) -> Result:
    """STEPS steps at once, and the same with the state moved to a new method after `at` steps."""
    whole = train_method(group, name, settings, views)
    first = SmallRun(group, make_method(name, settings, views))
    for number in range(at):
        first.step(number, views)
    saved = {key: value.clone() for key, value in first.method.state_dict().items()}
    optimizer, generator = first.engine.optimizer_state(), torch.get_rng_state()
    second = SmallRun(group, make_method(name, settings, views))
    load_strict(second.method, saved, "the state")
    second.engine.load_optimizer_state({key: value.clone() for key, value in optimizer.items()})
    torch.set_rng_state(generator)
    losses = [second.step(number, views).scalars["loss"] for number in range(at, STEPS)]
    return {"whole": whole, "losses": torch.stack(losses), "state": second.method.state_dict()}


def check_resumes(name: str, settings: dict[str, Any], views: int = 2, at: int = 3) -> None:
    """What a method is after STEPS steps does not depend on having been saved and restored in between, to the bit."""
    [result] = run_ranks(1, resume, name, settings, views, at)
    assert torch.equal(result["losses"].double(), result["whole"]["loss"][at:])
    for key, value in result["state"].items():
        assert torch.equal(value.double(), result["whole"]["state"][key]), key


def parameters(method: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in method.parameters()])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, or |a - b| where b is 0."""
    return ((a - b).norm() / (b.norm() if b.norm() > 0 else 1)).item()
