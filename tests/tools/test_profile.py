"""`python -m tools.profile`: it must name what was made slow on purpose, and count work as formulas do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from configs.recipe import Recipe, load_recipe
from tools import profile
from tools.profiling.measure import Profile, Stage, profile_run
from tools.profiling.pieces import Pieces
from tools.profiling.verdict import verdict
from train import build_run
from trainers.engine import joined_ranks
from trainers.pretrain import Run

RECIPE = """
epochs: 4
batch_size: 8
data: {source: digits, limit: 40}
views: {plan: digits, size: 8}
encoder: {arch: resnet8x4}
method: {name: simclr, temperature: 0.2, projector: {layers: 2, hidden: 32, output: 16}}
optim: {name: sgd, lr: 0.5}
schedule: {warmup_epochs: 1}
"""
SLOW = 0.25  # seconds: far above a step of this recipe, on a loaded machine as well


@pytest.fixture(autouse=True)
def _allocator_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets it for its process, which here is that of the tests."""
    monkeypatch.setattr("tools.profile.keep_freed_memory", lambda config, device: False)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def run(recipe: Path, tmp_path: Path) -> Iterator[tuple[Run, Recipe]]:
    loaded = load_recipe(recipe)
    with joined_ranks(loaded.engine) as ranks:
        yield build_run(loaded, tmp_path, ranks), loaded


def slowed(call: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **settings: Any) -> Any:
        time.sleep(SLOW)
        return call(*args, **settings)

    return slow


def measured(run: Run, recipe: Recipe) -> Profile:
    return profile_run(run, recipe, seconds=0, compiled=False, say=lambda what: None)


def test_a_slow_loader_is_named(run: tuple[Run, Recipe]) -> None:
    made, recipe = run
    views = made.loader.views  # type: ignore[attr-defined]
    made.loader.views = slowed(views)  # type: ignore[attr-defined]
    found = measured(made, recipe)
    assert found.bottleneck == "data"
    assert found.waiting > 0.5
    assert "bound by waiting for data" in verdict(found, recipe)[0]
    alone = next(stage for stage in found.data if stage.name == "loader")
    assert alone.seconds >= SLOW


def test_a_slow_loss_is_named(run: tuple[Run, Recipe]) -> None:
    made, recipe = run
    made.method.loss = slowed(made.method.loss)  # type: ignore[method-assign]
    found = measured(made, recipe)
    assert found.bottleneck == "loss"
    assert "bound by the loss" in verdict(found, recipe)[0]
    assert "batch_size=8" in verdict(found, recipe)[1]


def test_a_slow_optimizer_is_named(run: tuple[Run, Recipe]) -> None:
    made, recipe = run
    optimizer = made.engine.optimizer
    optimizer.step = slowed(optimizer.step)  # type: ignore[method-assign]
    found = measured(made, recipe)
    assert found.bottleneck == "optimizer"
    assert "batch_size=16 halves its share" in verdict(found, recipe)[1]


def test_a_slow_encoder_is_as_it_should_be(run: tuple[Run, Recipe]) -> None:
    made, recipe = run
    made.method.encoder.register_forward_hook(lambda module, inputs, output: time.sleep(SLOW))
    found = measured(made, recipe)
    assert found.bottleneck == "encoder"
    assert "as it should be" in verdict(found, recipe)[0]


@pytest.mark.parametrize("setting", ["engine.accumulation=2", "engine.precision=float64"])
def test_two_passes_and_doubles_are_measured(setting: str, recipe: Path, tmp_path: Path) -> None:
    options = ["--seconds", "0", "--output", str(tmp_path / "found")]
    done = CliRunner().invoke(profile.app, [str(recipe), setting, *options])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found" / "profile.json").read_text())
    work = {
        stage["name"]: float(stage["floor_of"].split()[0]) for stage in found["step"] if "GFLOP" in stage["floor_of"]
    }
    passes = 4 if "accumulation" in setting else 3  # the products of a linear layer: forward once or twice, backward
    assert work["heads"] == pytest.approx(passes * 2 * 16 * (256 * 32 + 32 * 16) / 1e9, rel=0.01)


def test_the_work_is_counted_as_formulas_do_and_the_run_left_as_it_was(run: tuple[Run, Recipe]) -> None:
    made, recipe = run
    micro_batches = next(iter(made.loader.epoch(0)))
    before = {name: value.clone() for name, value in made.method.named_parameters()}
    encoder = made.method.encoder
    pieces = Pieces(made, micro_batches, torch.float32)
    rows = 2 * 8
    # Two linear layers 256 -> 32 -> 16: forward, and two products of the same size backward.
    assert pieces.operations(pieces.heads()) == 3 * 2 * rows * (256 * 32 + 32 * 16)
    convolutions = 0

    def note(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal convolutions
        assert isinstance(module, torch.nn.Conv2d)
        once = 2 * output.numel() * module.in_channels * module.kernel_size[0] * module.kernel_size[1]
        first = module is encoder.conv1  # no gradient flows to the images
        convolutions += once * (2 if first else 3)

    hooks = [m.register_forward_hook(note) for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    counted = pieces.operations(pieces.encoder)
    for hook in hooks:
        hook.remove()
    assert counted == convolutions

    measured(made, recipe)
    assert made.method.encoder is encoder
    after = dict(made.method.named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_shares_and_advice_come_from_the_figures() -> None:
    def of(whole: float, **stages: float) -> Profile:
        step = [Stage(name, seconds) for name, seconds in stages.items()]
        facts = {"device": "CPU", "cores_of_a_rank": 8, "workers": 2, "threads": 8, "views": [2, 4, 3, 96, 96]}
        data = [Stage("decode", 0.6), Stage("photometry", 0.1), Stage("loader", 0.8)]
        return Profile(256, "native", facts, None, data, step, sum(stages.values()), whole, 0.0)  # type: ignore[arg-type]

    found = of(1.0, encoder=0.5, loss=0.05, rest=0.05)
    assert found.shares == pytest.approx({"data": 0.4, "encoder": 0.5, "loss": 0.05, "rest": 0.05})
    assert found.bottleneck == "data"  # the loader alone takes 0.8, the step 0.6: a faster encoder would gain nothing
    assert of(2.0, encoder=1.5, loss=0.05, rest=0.05).bottleneck == "encoder"


def test_the_command_writes_what_it_found(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "found"
    done = CliRunner().invoke(profile.app, [str(recipe), "--seconds", "0", "--trace", "--output", str(folder)])
    assert done.exit_code == 0, done.output
    for words in ("photometry alone", "loader alone", "encoder", "heads", "loss", "optimizer", "all, with the loader"):
        assert words in done.output
    found = json.loads((folder / "profile.json").read_text())
    parts = sum(stage["seconds"] for stage in found["step"])
    assert parts >= found["step_seconds"] * 0.999
    assert found["images_per_second"]["whole"] == pytest.approx(8 / found["whole_seconds"])
    assert found["shares"].keys() >= {"data", "encoder", "heads", "loss", "optimizer", "monitors", "rest"}
    assert (folder / "waterfall.png").read_bytes()[:4] == b"\x89PNG"
    events = json.loads((folder / "trace-rank0.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "step" and event.get("ph") == "X" for event in events) >= 3


def test_a_stub_leaves_nothing_of_the_encoder(recipe: Path, tmp_path: Path) -> None:
    options = ["--stub", "--seconds", "0", "--output", str(tmp_path / "found")]
    done = CliRunner().invoke(profile.app, [str(recipe), *options])
    assert done.exit_code == 0, done.output
    assert "tiny.yaml, stub encoder" in done.output
    [work] = [
        stage["floor_of"]
        for stage in json.loads((tmp_path / "found" / "profile.json").read_text())["step"]
        if stage["name"] == "encoder"
    ]
    # 16 views, 3 x 8 x 8 pixels -> 64 features: forward, and the weight's gradient (none flows to the images)
    assert float(work.split()[0]) == pytest.approx(2 * 2 * 16 * 192 * 64 / 1e9, rel=0.01)


def test_mistakes_are_one_line(recipe: Path, tmp_path: Path) -> None:
    for arguments in (["nothing.yaml"], [str(recipe), "batch_size=100000"], [str(recipe), "--output", str(recipe)]):
        done = CliRunner().invoke(profile.app, arguments)
        assert done.exit_code == 2, done.output
        assert "Traceback" not in done.output
