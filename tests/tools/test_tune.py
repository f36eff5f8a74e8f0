"""`python -m tools.tune`: search and sweep against known answers, tries that are stopped, and what is written."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from configs.recipe import RecipeError, load_recipe
from tests.tools import hungry
from tools import tune
from tools.tuning.batch_size import Tries, TuneError, largest_batch
from tools.tuning.lr_range import Curve, sweep
from tools.tuning.writing import where_to_write, write_recipe
from trainers.memory import is_out_of_memory

RECIPE = """
epochs: 4
batch_size: 32
data: {source: digits, limit: 64}
views: {plan: digits, size: 8}
encoder: {arch: resnet8x4}
method: {name: simclr, temperature: 0.2, projector: {hidden: 32, output: 16}}
optim: {name: sgd, lr: 0.5, lr_scaling: linear}
schedule: {warmup_epochs: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(tune.app, [str(argument) for argument in arguments])


# ---- the search -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 8, 24])
@pytest.mark.parametrize("limit", [1, 7, 8, 64, 100, 1797, 50_000])
@pytest.mark.parametrize("start", [1, 32, 100, 4096, 10**6])
def test_the_search_finds_the_largest_batch_that_fits(start: int, limit: int, unit: int) -> None:
    for capacity in (0, 1, 7, 8, 9, 23, 24, 25, 31, 32, 33, 63, 64, 99, 100, 101, 4095, 4096, 4097, 10**9):
        tried: list[int] = []

        def fits(batch: int, capacity: int = capacity, tried: list[int] = tried) -> bool:
            tried.append(batch)
            return batch <= capacity

        expected = max((batch for batch in range(0, limit + 1, unit) if batch <= capacity), default=0)
        assert largest_batch(fits, start=start, unit=unit, limit=limit) == expected
        assert all(0 < batch <= limit and batch % unit == 0 for batch in tried)
        assert len(set(tried)) == len(tried) <= 2 * math.log2(max(2, limit // unit)) + 2


def test_the_search_is_by_doubling_then_bisection() -> None:
    """24 images too many at 1,024: bytes are 300 and 1.5 an image, of 1,800."""
    tried: list[int] = []
    found = largest_batch(
        lambda batch: not tried.append(batch) and 300 + 1.5 * batch <= 1800, start=250, unit=8, limit=10**5
    )
    assert found == 1000
    assert tried == [248, 496, 992, 1984, 1488, 1240, 1112, 1048, 1016, 1000, 1008]


# ---- tries in processes of their own --------------------------------------------------------------------


def test_a_try_that_passes_its_budget_is_stopped(recipe: Path) -> None:
    tries = Tries(recipe, ["data.limit=1000"], memory=400 * 10**6, margin=0.25, work=hungry.allocate)
    before = psutil.Process().memory_info().rss
    assert tries.fits(64)
    assert not tries.fits(512)  # a gigabyte
    fitted, stopped = tries.tried
    assert 64 * hungry.MB_AN_IMAGE < fitted.peak / 1e6 < 300  # type: ignore[operator]
    assert stopped.outcome == "stopped on passing the budget"
    assert 300 < stopped.peak / 1e6 < 800  # type: ignore[operator]
    assert not psutil.pid_exists(int(recipe.with_suffix(".pid").read_text()))
    assert psutil.Process().memory_info().rss - before < 50 * 10**6


def test_real_steps_that_pass_their_budget_are_stopped(recipe: Path) -> None:
    tries = Tries(recipe, [], memory=100 * 10**6)
    assert not tries.fits(32)
    assert tries.tried[0].outcome == "stopped on passing the budget"
    assert tries.device == "CPU"


def test_on_a_gpu_its_own_memory_counts(recipe: Path) -> None:
    tries = Tries(recipe, ["data.limit=1197"], work=hungry.on_a_gpu)
    assert tries.fits(600)  # 900 MB, of what is free 10 % less
    assert not tries.fits(608)
    assert [one.outcome for one in tries.tried] == ["fits", "too large"]
    share = Tries(recipe, ["data.limit=1197"], work=hungry.on_a_gpu, ranks=2)
    assert share.fits(1184)
    assert share.tried[0].peak == (300 + 592) * 10**6


def test_tries_that_end_otherwise(recipe: Path) -> None:
    killed = Tries(recipe, [], work=hungry.killed)
    assert not killed.fits(32)
    assert "killed by the system" in killed.tried[0].outcome
    full = Tries(recipe, [], work=hungry.no_memory)
    assert not full.fits(32)
    assert full.tried[0].outcome == "out of memory"
    with pytest.raises(TuneError, match="exit code 3, for a reason that is not memory"):
        Tries(recipe, [], work=hungry.broken).fits(32)
    refused = Tries(recipe, [], work=hungry.broken)
    assert not refused.fits(72)
    assert "larger than the 64 training images" in refused.tried[0].outcome
    assert not Tries(recipe, ["engine.accumulation=3"], work=hungry.broken).fits(32)


def test_what_allocators_say_is_understood() -> None:
    import torch

    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    with pytest.raises(RuntimeError) as told:
        torch.empty(2**60)
    assert is_out_of_memory(told.value)
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


# ---- the sweep ------------------------------------------------------------------------------------------


def quadratic(curvatures: np.ndarray) -> Any:
    """Noisy gradient descent on the sum of curvature · w² / 2: it diverges from lr = 2 / max(curvatures) on."""
    weights, noise = np.ones_like(curvatures), np.random.default_rng(0)

    def step(lr: float) -> float:
        loss = float((curvatures * weights**2).sum() / 2)
        weights[:] -= lr * curvatures * (weights + 0.1 * noise.standard_normal(weights.shape))
        return loss

    return step


@pytest.mark.parametrize("largest", [0.5, 20.0, 3000.0])
@pytest.mark.parametrize("others", [0.01, 0.3])
def test_the_sweep_of_a_quadratic_stops_soon_after_its_stability_limit(largest: float, others: float) -> None:
    limit = 2 / largest
    curve = sweep(quadratic(np.geomspace(others * largest, largest, 20)), limit * 1e-3, limit * 1e3, 120)
    assert curve.ended.startswith("the smoothed loss was above 4 times its best")
    assert limit < curve.lrs[-1] < 3 * limit
    assert limit / 1000 < curve.suggestion < limit  # type: ignore[operator]
    assert curve.minimum < 2 * limit
    assert np.allclose(np.diff(np.log(curve.lrs)), np.log(1e6) / 119)


def test_losses_are_smoothed_without_a_bias_to_the_first() -> None:
    losses = list(np.random.default_rng(0).uniform(1, 2, 40))
    given = iter(losses)
    curve = sweep(lambda lr: float(next(given)), 1e-3, 1.0, 40)
    for step in (0, 1, 7, 39):
        weights = 0.9 ** np.arange(step, -1, -1)
        assert curve.smoothed[step] == pytest.approx((weights * losses[: step + 1]).sum() / weights.sum(), rel=1e-12)


def test_the_suggestion_is_where_the_loss_falls_most() -> None:
    """A loss that falls from 6 to 4 around 1e-2 with a decade of width, and rises and falls again beyond 1."""

    def loss(lr: float) -> float:
        return 5 - math.tanh(math.log10(lr) + 2) + (3.0 if 1 < lr < 3 else 0.0)

    curve = sweep(loss, 1e-5, 10.0, 400)
    assert 1e-2 < curve.suggestion < 1.5e-2  # type: ignore[operator]  # the mean is some ten steps late
    assert curve.ended == "all 400 steps were made"


def test_sweeps_that_find_nothing_or_end_early() -> None:
    assert sweep(lambda lr: 1 + lr, 1e-3, 1.0, 50).suggestion is None
    assert sweep(lambda lr: 1.0, 1e-3, 1.0, 50).suggestion is None
    curve = sweep(lambda lr: math.nan if lr > 0.1 else 1 - lr, 1e-3, 1.0, 50)
    assert curve.ended.startswith("the loss was nan")
    assert curve.lrs[-1] <= 0.1
    assert np.isfinite(curve.losses).all()
    assert sweep(lambda lr: math.inf, 1e-3, 1.0, 50) == Curve([], [], [], "the loss was inf at 0.001")
    below_zero = sweep(lambda lr: -1 - math.log10(lr / 1e-3) + 0.1 * math.sin(1e4 * lr), 1e-3, 1.0, 50)
    assert below_zero.ended == "all 50 steps were made"
    assert sweep(lambda lr: -1 + 100 * (lr > 0.1) * lr, 1e-3, 1.0, 50).lrs[-1] < 0.2


# ---- what is written ------------------------------------------------------------------------------------


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for key in old | new:
        if isinstance(old.get(key), dict):
            found |= {f"{key}.{inner}": value for inner, value in differences(old[key], new[key]).items()}
        elif old.get(key) != new.get(key):
            found[key] = new.get(key)
    return found


def test_the_recipe_differs_in_just_what_was_found(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    output = tmp_path / "a" / "b" / "tuned.yaml"
    found = {"batch_size": 48, "optim.lr": 1e-5}
    write_recipe(output, recipe, ["optim.weight_decay=0.5", "seed=3"], found, ["How: " + "by trying " * 30])
    changes = differences(load_recipe(recipe).resolved(), load_recipe(output).resolved())
    assert changes == {"batch_size": 48, "optim.lr": 1e-5, "optim.weight_decay": 0.5, "seed": 3}
    text = output.read_text()
    assert yaml.safe_load(text)["extends"] == "../../tiny.yaml"
    assert max(map(len, text.splitlines())) <= 120
    assert os.listdir(output.parent) == ["tuned.yaml"]
    with pytest.raises(RecipeError, match="larger than the 64 training images"):
        write_recipe(output, recipe, [], {"batch_size": 128}, [])
    assert output.read_text() == text
    assert os.listdir(output.parent) == ["tuned.yaml"]


def test_where_it_is_written(recipe: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tiny-tuned.yaml"
    assert where_to_write(recipe, None, ("-lr.png",), force=False) == [tuned, tmp_path / "tiny-tuned-lr.png"]
    tuned.write_text("extends: tiny.yaml")
    with pytest.raises(RecipeError, match=r"tiny-tuned.yaml is there already"):
        where_to_write(recipe, None, (), force=False)
    assert where_to_write(recipe, None, (), force=True) == [tuned]
    again = tmp_path / "again.yaml"
    again.write_text("extends: [tiny-tuned.yaml]")
    for path in (recipe, tuned, again):
        with pytest.raises(RecipeError, match="builds on this file"):
            where_to_write(again, path, (), force=True)
    (tmp_path / "new-lr.png").touch()
    with pytest.raises(RecipeError, match=r"new-lr.png is there already"):
        where_to_write(recipe, tmp_path / "new.yaml", ("-lr.png",), force=False)
    with pytest.raises(RecipeError, match=r"ends in .yaml"):
        where_to_write(recipe, tmp_path / "new.json", (), force=False)
    with pytest.raises(RecipeError, match="not a folder that can be written to"):
        where_to_write(recipe, tmp_path / "nowhere" / "new.yaml", (), force=False)


# ---- as a user calls it ---------------------------------------------------------------------------------


def test_batch_and_learning_rate_of_a_recipe(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 32 images fit, in one try, and the sweep is made with them."""
    monkeypatch.chdir(tmp_path)
    result = call(
        "tiny.yaml", "data.limit=32", "--batch-size", "--lr", "--multiple", 32, "--steps", 20, "--lr-min", 1e-3
    )
    assert result.exit_code == 0, result.output
    written = ["tiny-tuned-lr.json", "tiny-tuned-lr.png", "tiny-tuned.yaml", "tiny.yaml"]
    assert sorted(os.listdir(tmp_path)) == written  # and no run
    assert "steps in an epoch of 32 images: 1\n" in result.output
    assert "optim.lr_scaling=linear: the peak learning rate" not in result.output  # the batch is that of the start

    facts = json.loads((tmp_path / "tiny-tuned-lr.json").read_text())
    assert len(facts["lr"]) == len(facts["loss"]) == len(facts["smoothed"]) <= 20
    assert facts["lr"][0] == pytest.approx(1e-3)
    assert facts["loss"][0] == pytest.approx(math.log(63), abs=1)  # that of chance
    assert facts["optim_lr"] == pytest.approx(facts["suggestion"] * 256 / 32)

    tuned = load_recipe(tmp_path / "tiny-tuned.yaml")
    assert tuned.optim.scaled_lr(32) == pytest.approx(facts["suggestion"], rel=5e-3)
    changes = differences(load_recipe(recipe).resolved(), tuned.resolved())
    assert changes == {"data.limit": 32, "optim.lr": tuned.optim.lr}
    comments = [line for line in (tmp_path / "tiny-tuned.yaml").read_text().splitlines() if line.startswith("#")]
    assert comments[0] == "# Written by python -m tools.tune tiny.yaml data.limit=32"
    assert "all the training images there are" in " ".join(comments)

    with Image.open(tmp_path / "tiny-tuned-lr.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[0] >= 500
    red, green, blue = pixels.reshape(-1, 3).T
    for one, two, three in ((red, green, blue), (green, red, blue), (blue, red, green)):  # both marks, and the curve
        assert ((one > two + 40) & (one > three + 40)).sum() > 200

    again = call("tiny.yaml", "--lr")
    assert again.exit_code == 2
    assert "tiny-tuned.yaml is there already" in again.output


def test_nothing_fits(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tries, "_tried", lambda self, batch: tune_try(batch, "out of memory"))
    result = call(recipe, "--batch-size")
    assert result.exit_code == 2
    assert "not even batch_size=8 fits (out of memory); raise engine.accumulation or --memory" in result.output
    assert not recipe.with_name("tiny-tuned.yaml").exists()


def test_the_rule_of_the_learning_rate_is_told(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tries, "_tried", lambda self, batch: tune_try(batch, "fits" if batch <= 48 else "too large"))
    result = call(recipe, "--batch-size", "--force")
    assert result.exit_code == 0, result.output
    assert "optim.lr_scaling=linear: the peak learning rate goes from 0.0625 to 0.0938" in result.output
    assert load_recipe(recipe.with_name("tiny-tuned.yaml")).batch_size == 48
    result = call(recipe, "optim.lr_scaling=none", "--batch-size", "--force")
    assert "the peak learning rate stays 0.5" in result.output
    result = call(recipe, "engine.accumulation=2", "--batch-size", "--force", "--ranks", 3, "--multiple", 2)
    assert load_recipe(recipe.with_name("tiny-tuned.yaml")).batch_size == 48
    result = call(recipe, "--batch-size", "--force", "--multiple", 7)
    assert load_recipe(recipe.with_name("tiny-tuned.yaml")).batch_size == 42


def tune_try(batch: int, outcome: str) -> Any:
    from tools.tuning.batch_size import Try

    return Try(batch, outcome, 10**9, 100.0)


REFUSALS = {
    "nothing asked": ((), "say what to look for: --batch-size, --lr, or both"),
    "unknown key": (("optim.lrr=1", "--lr"), "there is no such key; did you mean lr?"),
    "not an override": (("nonsense", "--lr"), "write key.sub=value"),
    "batch": (("batch_size=65", "--batch-size"), "larger than the 64 training images"),
    "no data": (("data.source=cifar10", "data.root=/nowhere", "--batch-size"), "/nowhere"),
    "memory": (("--batch-size", "--memory", "8 apples"), "expected a size such as 8GB"),
    "no memory": (("--batch-size", "--memory", "0GB"), "expected a size such as 8GB"),
    "memory of lr": (("--lr", "--memory", "8GB"), "--memory is for --batch-size"),
    "range of a batch": (("--batch-size", "--lr-min", "1"), "--lr-min is for --lr"),
    "range": (("--lr", "--lr-min", "1", "--lr-max", "1"), "expected 0 < --lr-min < --lr-max"),
    "endless range": (("--lr", "--lr-max", "inf"), "expected 0 < --lr-min < --lr-max"),
    "ranks of lr": (("--batch-size", "--lr", "--ranks", "2"), "--lr needs the whole batch in this process"),
    "itself": (("--lr", "--force", "--output", "RECIPE"), "builds on this file"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, recipe: Path) -> None:
    arguments, message = REFUSALS[case]
    result = call(recipe, *(str(recipe) if argument == "RECIPE" else argument for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.startswith("error: ")
    assert len(result.output.splitlines()) == 1
    assert os.listdir(recipe.parent) == ["tiny.yaml"]


def test_a_missing_recipe_and_several_ranks(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = call(recipe.with_name("tinny.yaml"), "--lr")
    assert result.exit_code == 2
    assert f"did you mean {recipe}?" in result.output
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = call(recipe, "--batch-size")
    assert result.exit_code == 2
    assert "start it without torchrun" in result.output
