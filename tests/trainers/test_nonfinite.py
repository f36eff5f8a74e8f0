"""NaN and infinity: named, dumped so that the batch can be drawn again, never saved; or undone to the bit."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from configs.recipe import load_recipe
from pipelines.sources import DataConfig, open_source
from tests.distributed import run_ranks
from tests.trainers.small_runs import LR, STEPS, SmallRun, make_method, micro_batches, views_of_step
from train import build_run
from trainers.engine import Ranks
from trainers.failures import TrainingError
from trainers.methods import BaseMethod
from trainers.nonfinite import NonfiniteGuard
from trainers.pretrain import pretrain
from trainers.runlog import LogConfig, RunLog

PROJECTOR = {"hidden": 32, "output": 16}
RECIPE = """
epochs: 3
batch_size: 32
data: {source: digits, limit: 160}
views: {plan: digits, size: 8}
encoder: {arch: resnet8x4}
method: {name: simclr, projector: {hidden: 32, output: 16}}
schedule: {warmup_epochs: 1}
checkpoint: {every_epochs: 0.4}
log: {every_steps: 4}
"""  # 5 steps an epoch, 15 in all; a checkpoint every 2; rows every 4


def poison(method: BaseMethod, calls: set[int], image: int) -> None:
    """NaN in the features of one image of the forward passes of those numbers, from 1, in train mode."""
    embed, count = method.embed, 0

    def poisoned(views: Tensor) -> dict[str, Tensor]:
        nonlocal count
        embedded = embed(views)
        count += method.training
        if method.training and count in calls:
            mask = torch.zeros(views.shape[1], 1)
            mask[image] = torch.nan
            embedded = {name: value + mask for name, value in embedded.items()}
        return embedded

    method.embed = poisoned  # type: ignore[method-assign]


def trained(
    group: dist.ProcessGroup, recipe: Path, directory: Path, bad: dict[int, set[int]], *overrides: str
) -> tuple[int, str]:
    """The recipe trained with NaN in the steps `bad` of each rank; (exit code, message)."""
    world = dist.get_world_size()
    control = dist.new_group(backend="gloo") if world > 1 else None
    ranks = Ranks(dist.get_rank(), world, torch.device("cpu"), group if world > 1 else None, control)
    run = build_run(load_recipe(recipe, overrides), directory, ranks)
    if ranks.is_main:
        directory.mkdir(exist_ok=True)
        (directory / "recipe.yaml").write_text(recipe.read_text())
    ranks.barrier()
    poison(run.method, bad.get(ranks.rank, set()), image=3)
    try:
        return pretrain(run), ""
    except TrainingError as error:
        return 1, str(error)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def test_one_rank_s_nan_ends_all_with_a_dump_that_draws_the_batch_again(recipe: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    outcomes = run_ranks(2, trained, recipe, directory, {1: {7}})
    assert {code for code, _ in outcomes} == {1}
    assert outcomes[0] == outcomes[1], "both ranks say the same"
    message = outcomes[0][1]
    dump = directory / "nonfinite/step-00000007.json"
    for part in ("step 7 (lr ", f"embeddings (features, z) of 1 of 32 images are not finite on rank 1 (loss nan); its "
                 f"images are listed in {dump}", "engine.nonfinite=skip"):  # fmt: skip
        assert part in message

    facts = json.loads(dump.read_text())
    assert (facts["step"], facts["epoch"], facts["step_in_epoch"]) == (7, 1, 1)
    assert [report["scalars"]["loss"] for report in facts["ranks"]] == ["nan", "nan"]
    assert [len(report["indices"]) for report in facts["ranks"]] == [16, 16]
    assert facts["ranks"][0]["nonfinite_images"] == {}
    culprit = facts["ranks"][1]["indices"][3]
    assert facts["ranks"][1]["nonfinite_images"] == {"features": [culprit], "z": [culprit]}
    source = open_source(DataConfig(source="digits", limit=160), "pretrain")
    for report in facts["ranks"]:
        assert report["labels"] == source.labels[report["indices"]].tolist()
        assert report["ids"] == source.ids[report["indices"]].tolist()
        assert len(report["images"]) == 16
    drawn = run_ranks(1, drawn_again, recipe, directory, facts["epoch"], facts["step_in_epoch"])[0]
    assert drawn == [index for report in facts["ranks"] for index in report["indices"]]

    # Steps 2, 4 and 6 were saved; 8, after the step that was bad, must not be, and its row not be written.
    assert sorted(path.name for path in (directory / "checkpoints").glob("step-*"))[-1] == "step-00000006"
    for file in (directory / "checkpoints").glob("step-*/*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values() if value.is_floating_point())
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == [4]


def drawn_again(group: dist.ProcessGroup, recipe: Path, directory: Path, epoch: int, step: int) -> list[int]:
    run = build_run(load_recipe(recipe), directory / "again", Ranks(0, 1, torch.device("cpu"), None, None))
    [batch] = next(iter(run.loader.epoch(epoch, step)))
    assert batch.views.isfinite().all()
    return batch.indices.tolist()


def test_skipped_steps_are_counted_and_bounded(recipe: Path, tmp_path: Path) -> None:
    options = ("engine.nonfinite=skip", "engine.skips_in_a_row=2", "engine.skips=4")
    [[code, message], *_] = run_ranks(2, trained, recipe, tmp_path / "few", {0: {3, 4}, 1: {6, 9}}, *options)
    assert (code, message) == (0, "")
    rows = [json.loads(line) for line in (tmp_path / "few/metrics.jsonl").read_text().splitlines()]
    skipped = {row["step"]: row["train/skipped_steps"] for row in rows if "train/skipped_steps" in row}
    assert skipped == {4: 2, 8: 3, 12: 4, 15: 4}
    assert all(row["train/loss"] == row["train/loss"] for row in rows if "train/loss" in row)
    dumps = sorted(path.name for path in (tmp_path / "few/nonfinite").iterdir())
    assert dumps == [f"step-{step:08d}.json" for step in (3, 4, 6, 9)]
    meters = load_file(tmp_path / "few/checkpoints/last/meters.safetensors")
    assert int(meters["skipped_steps::total"]) == 4

    [[code, message], *_] = run_ranks(1, trained, recipe, tmp_path / "row", {0: {5, 6, 7, 8}}, *options)
    assert code == 1
    assert "step 7 (lr " in message
    assert "3 steps in a row and 3 in all were skipped, more than engine.skips_in_a_row=2" in message


def infinite_gradient(method: BaseMethod) -> None:
    """The loss stays as it is, and its gradient is NaN: what the root of zero does."""
    loss = method.loss

    def rooted(embeddings: dict[str, Tensor], *rest: Any) -> dict[str, Tensor]:
        scalars = loss(embeddings, *rest)
        return scalars | {"loss": scalars["loss"] + (embeddings["z"] * 0).sum().sqrt()}

    method.loss = rooted  # type: ignore[method-assign]


CASES: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "lars": {"optimizer": "lars"},
    "adam": {"optimizer": "adam"},
    "micro-batches": {"optimizer": "sgd", "accumulation": 2, "clipping": 1.0},
    "zero 1": {"optimizer": "adam", "zero_stage": 1},
    "zero 2": {"optimizer": "sgd", "zero_stage": 2},
}


def everything(run: SmallRun) -> dict[str, Tensor]:
    state = dict(run.method.state_dict()) | run.engine.optimizer_state()
    return {name: value.detach().clone() for name, value in state.items()}


def guarded(run: SmallRun, directory: Path, **changes: Any) -> NonfiniteGuard:
    run.engine.config = run.engine.config.model_copy(update=changes)
    log = RunLog(LogConfig(), directory, run.ranks, total_steps=STEPS, batch_size=1, recipe={})
    source = open_source(DataConfig(source="digits"), "pretrain")
    loader: Any = SimpleNamespace(source=source, steps_per_epoch=STEPS)
    return NonfiniteGuard(run.engine, run.method, loader, directory, log)


def undone(group: dist.ProcessGroup, directory: Path) -> dict[str, list[str]]:
    """By case, what a run with undone steps has otherwise than one that never saw them."""
    different: dict[str, list[str]] = {}
    for name, case in CASES.items():
        dtype = torch.float32 if "zero" in name else torch.float64
        settings = {"queue_size": 48, "projector": PROJECTOR, "predictor": {"hidden": 32}}
        calm, rough = (SmallRun(group, make_method("nnclr", settings, dtype=dtype), **case) for _ in range(2))
        guard = guarded(rough, directory, nonfinite="skip")
        start, number = everything(rough), 0

        def skip(guard: NonfiniteGuard = guard, rough: SmallRun = rough) -> None:
            """Two bad steps: NaN in the embeddings, and in the gradient alone."""
            nonlocal number
            for spoil in (lambda: poison(rough.method, {1}, 1), lambda: infinite_gradient(rough.method)):
                before, number = everything(rough), number + 1
                spoil()
                batches = micro_batches(views_of_step(4, rough.dtype), rough.ranks, rough.accumulation)
                assert guard.step(number, batches, LR, lambda result: {"probe": torch.zeros(())}) == {}
                for changed_part in ("embed", "loss"):  # what is left are the class's own
                    rough.method.__dict__.pop(changed_part, None)
                after = everything(rough)
                assert before.keys() == after.keys()
                changed = [key for key in before if not torch.equal(before[key], after[key])]
                assert changed == [], (number, changed)

        skip()
        for step in range(3):
            calm.step(step)
            number += 1
            batches = micro_batches(views_of_step(step, rough.dtype), rough.ranks, rough.accumulation)
            assert guard.step(number, batches, LR, lambda result: {})["loss"].isfinite()
            skip()
        expected, got = everything(calm), everything(rough)
        assert any(not torch.equal(start[key], got[key]) for key in start), "nothing was trained"
        different[name] = [key for key in expected if not torch.equal(expected[key], got[key])]
        assert guard.log.skipped_steps == 8
        causes = [json.loads(path.read_text())["cause"] for path in sorted((directory / "nonfinite").iterdir())[:2]]
        assert "embeddings (features, z, p) of" in causes[0]
        assert "its gradient or the weights" in causes[1]
    return different


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_undone_step_leaves_no_trace(ranks: int, tmp_path: Path) -> None:
    for different in run_ranks(ranks, undone, tmp_path):
        assert different == {name: [] for name in CASES}


def refused_save(group: dist.ProcessGroup, directory: Path) -> str:
    run = SmallRun(group, make_method("simclr", {"projector": PROJECTOR}, dtype=torch.float32), optimizer="adam")
    guard = guarded(run, directory)
    guard.step(1, micro_batches(views_of_step(0, run.dtype), run.ranks, 1), LR, lambda result: {})
    guard.before_save(1)
    state = run.engine.optimizer_state()
    next(value for name, value in state.items() if name.endswith("exp_avg_sq")).fill_(torch.inf)
    with pytest.raises(TrainingError) as refused:
        guard.before_save(1)
    return str(refused.value)


def test_a_state_that_is_not_finite_is_not_saved_though_the_weights_are(tmp_path: Path) -> None:
    [message] = run_ranks(1, refused_save, tmp_path)
    assert "no checkpoint is written, for 1 of its tensors hold NaN or infinity" in message
    assert "exp_avg_sq" in message
