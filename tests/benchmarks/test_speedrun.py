"""The speedrun: its views, its bookkeeping, whole runs, its data, and what it refuses."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import cifar_speedrun
from benchmarks.speedrun import timed
from benchmarks.speedrun.clock import Clock, reached
from benchmarks.speedrun.compare import Runner, at_equal_accuracy, take_turns
from benchmarks.speedrun.data import load, stratified
from benchmarks.speedrun.evaluation import scores
from benchmarks.speedrun.network import make_encoder
from benchmarks.speedrun.recipe import ABLATIONS, GPU, Recipe
from benchmarks.speedrun.timed import Budget, ablate, summary, timed_runs
from benchmarks.speedrun.trainer import Trainer
from benchmarks.speedrun.views import draw_boxes, draw_colours
from pipelines.subsets import stratified_draw
from tests.benchmarks.stripes import CPU, TINY, stripes
from trainers.encoders import EncoderConfig, build_encoder

ROOT = Path(__file__).resolve().parent.parent.parent


# ---- views and encoder ----------------------------------------------------------------------------------


def test_boxes_and_colours_are_within_their_ranges() -> None:
    torch.manual_seed(0)
    boxes = draw_boxes(4000, 32, 0.2, CPU)
    top, left, height, width = boxes.unbind(1)
    assert int(boxes[:, :2].min()) >= 0
    assert int((top + height).max()) <= 32
    assert int((left + width).max()) <= 32
    area = (height * width).double() / 1024
    assert 0.17 < area.min() < 0.25  # sides are rounded to pixels
    # Uniform between 0.2 and 1, but for boxes that do not fit and are drawn again: rather smaller ones stay.
    assert 0.5 < area.mean() < 0.61
    colours = draw_colours(4000, replace(Recipe(), grey=0.1, flip=0.5), CPU)
    assert torch.equal(colours.order.sort(1).values, torch.arange(4).expand(4000, 4))
    for drawn, share in ((colours.flip, 0.5), (colours.jitter, 0.8), (colours.grayscale, 0.1)):
        assert abs(drawn.double().mean() - share) < 5 * math.sqrt(share * (1 - share) / 4000)
    assert 0.6 <= colours.brightness.min() < 0.62
    assert 1.38 < colours.brightness.max() <= 1.4
    assert -0.1 <= colours.hue.min() < -0.098
    assert not colours.blur_sigma.any()


def test_the_encoder_is_the_one_of_the_recipes() -> None:
    own, width = make_encoder("resnet18")
    other = build_encoder(EncoderConfig(arch="resnet18"), 32)
    other.load_state_dict(own.state_dict())
    pixels = torch.randn(2, 3, 16, 16)
    found = own.eval()(pixels)
    assert found.shape == (2, width)
    torch.testing.assert_close(found, other.eval()(pixels))


def test_the_gpu_mode_is_imported_with_torch_torchvision_triton_and_numpy() -> None:
    missing = "pydantic", "yaml", "rich", "typer", "sklearn", "psutil", "deepspeed", "numba", "scipy"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({missing!r}))
import benchmarks.cifar_speedrun
from benchmarks.speedrun.network import make_encoder
make_encoder("resnet18")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- bookkeeping ----------------------------------------------------------------------------------------


def test_the_clock_leaves_out_what_is_outside() -> None:
    times = iter([10.0, 13.0, 100.0, 104.0])
    clock = Clock(lambda: next(times))
    with clock.running():
        pass
    assert clock.seconds == 3.0
    with clock.running():
        pass
    assert clock.seconds == 7.0


def test_a_target_is_reached_at_the_first_check_that_has_it() -> None:
    curve = [{"seconds": 1.0, "knn": 50.0}, {"seconds": 2.0, "knn": 90.0}, {"seconds": 3.0, "knn": 95.0}]
    assert reached(curve, "knn", 90.0) == curve[1]
    assert reached(curve, "knn", 96.0) is None
    assert reached(curve, "linear", 1.0) is None
    runs = [{"reached": {"linear 83": s, "knn 90": None, "linear 90": None}} for s in (10.0, 14.0, None)]
    assert summary(runs)["linear 83"] == {
        "seeds": 3,
        "reached": 2,
        "mean_seconds": 12.0,
        "sd_seconds": pytest.approx(math.sqrt(8)),
    }
    assert summary(runs)["knn 90"]["mean_seconds"] is None


class Scripted:
    """A contender whose epochs take a told time and whose encoder scores as told."""

    def __init__(self, now: list[float], takes: float, scores: list[float]) -> None:
        self.now, self.takes, self.scores, self.encoder = now, takes, scores, nn.Linear(1, 1)

    def epoch(self) -> float:
        self.now[0] += self.takes
        nn.init.constant_(self.encoder.weight, self.scores.pop(0))
        return 0.0

    @property
    def done(self) -> bool:
        return not self.scores


def test_both_take_turns_and_are_compared_where_they_are_equally_good() -> None:
    now = [0.0]

    def score(encoder: nn.Module) -> dict[str, float]:
        now[0] += 1000  # evaluation: on nobody's clock
        return {"held_knn": next(encoder.parameters()).item()}

    made = {"ours": ([20, 41, 45], 2.0), "plain": ([30, 40, 42, 40], 10.0)}
    runners = {
        name: Runner(Scripted(now, takes, [float(v) for v in values]), Clock(lambda: now[0]), Clock(lambda: now[0] / 2))
        for name, (values, takes) in made.items()
    }
    order: list[str] = []
    take_turns(runners, score, lambda name, _: order.append(name), lambda: False)
    assert order == ["ours", "plain", "ours", "ours", "plain", "plain", "plain"]
    row = at_equal_accuracy(runners["ours"], runners["plain"], "knn")
    assert row["target"] == 40
    assert (row["ours"]["epoch"], row["ours"]["seconds"]) == (2, 4.0)
    assert (row["plain"]["epoch"], row["plain"]["seconds"]) == (2, 20.0)  # the first time, not the last
    assert (row["ratio_seconds"], row["ratio_cpu_seconds"]) == (5.0, 5.0)
    assert at_equal_accuracy(runners["plain"], runners["ours"], "knn")["ours"] is None


def test_when_time_is_over_each_has_made_one_epoch() -> None:
    now = [0.0]
    runners = {
        name: Runner(Scripted(now, 1.0, [1.0] * 5), Clock(lambda: now[0]), Clock(lambda: now[0])) for name in "ab"
    }
    take_turns(runners, lambda _: {}, lambda *_: None, lambda: True)
    assert [len(runner.curve) for runner in runners.values()] == [1, 1]


# ---- from end to end ------------------------------------------------------------------------------------


def test_the_gpu_mode_runs_its_seeds_and_its_ablations_on_a_cpu() -> None:
    data, lines = stripes(), list[str]()
    budget = Budget(time.monotonic() + 1e6)
    found = timed_runs(data, TINY, CPU, [0, 1], 2, budget, lines.append)
    assert found["epochs"] == 2
    for run in found["runs"]:
        assert not run["stopped"]
        assert [check["epoch"] for check in run["curve"]] == [1, 2]
        assert {"knn", "linear", "held_knn", "held_linear", "loss"} <= set(run["curve"][0])
        assert run["evaluation_seconds"] > 0
    rows = ablate(data, TINY, CPU, ["NT-Xent", "no average"], 0, budget, lines.append)
    assert [row["name"] for row in rows] == ["all tricks", "NT-Xent", "no average"]
    assert all("knn" not in row and "held_knn" in row for row in rows)  # never the test split
    assert rows[0]["effect"]["held_knn"] == 0
    spent = ablate(data, TINY, CPU, ["NT-Xent"], 0, Budget(-math.inf), lines.append)
    assert all(row["missing"] == "no time left" for row in spent)


def test_what_is_left_once_it_is_prepared_is_shared_by_what_recipes_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """240 epochs of a second are wanted of 120 s: the first 40 get 20 s, a tenth of them in reserve."""

    class Fake:
        encoder, epochs, made = None, 0, 0

        def seconds_of_an_epoch(self, clock: Clock) -> float:
            return 1.0

        def reset(self, seed: int) -> None: ...

        def epoch(self) -> float:
            self.made += 1
            return 0.0

        @property
        def done(self) -> bool:
            return self.made == self.epochs

    monkeypatch.setattr(timed, "_prepared", lambda *_: (Fake(), {"prepare_seconds": 10.0}))
    monkeypatch.setattr(timed, "scores", lambda *_, **__: {"knn": 1.0, "linear": 1.0})
    recipe, later = replace(TINY, epochs=40), [replace(TINY, epochs=200)]
    budget = Budget(time.monotonic() + 130)
    found = timed_runs(stripes(), recipe, CPU, [0], 2, budget, lambda line: None, later=later)
    assert found["epochs"] == 18
    assert not found["runs"][0]["stopped"]


def test_every_ablation_is_a_recipe() -> None:
    for name, change in ABLATIONS.items():
        assert any(replace(recipe, **change) != recipe for recipe in GPU.values()), name


def test_it_learns() -> None:
    recipe = replace(TINY, epochs=3, sizes=((0.0, 12),), crop=0.5)
    trainer = Trainer(stripes(64), recipe, CPU, seed=0)
    losses = []
    while not trainer.done:
        losses.append(trainer.epoch())
    assert losses[-1] < losses[0]
    assert scores(trainer.encoder, trainer.data, CPU)["linear"] > 80  # chance is 50


@pytest.mark.slow
def test_the_cpu_mode_runs_to_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "found.json"
    options = ["--data", "digits", "--cpu", "--set", "epochs=2", "--plain-epochs", "1", "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["x", *options, "--images", "300", "--threads", "1", "--json", str(out)])
    assert cifar_speedrun.main() == 0
    text = out.read_text()
    assert '"mode": "cpu"' in text
    assert '"ratio_seconds"' in text


# ---- data -----------------------------------------------------------------------------------------------


def test_what_is_held_out_is_what_evaluate_holds_out() -> None:
    labels = np.random.RandomState(3).permutation(np.repeat(np.arange(10), 50))
    assert stratified(labels, 0.1).tolist() == stratified_draw(labels, 50, 0).tolist()


def test_a_folder_is_read_into_three_parts(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8), (10 * number, 200 * label, 0)).save(folder / f"{number:02d}.png")
    data = load(str(tmp_path), images=10)
    assert [len(data.train), len(data.holdout), len(data.test)] == [10, 4, 6]
    assert data.train.labels.bincount().tolist() == [5, 5]
    assert torch.equal(data.test.images[:, 0, 0, 1].long(), 200 * data.test.labels)
    assert data.mean[1] == pytest.approx(100 / 255)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--data", "/no/such/folder"], "there is no folder"),
        (["--data", "."], "holds neither train/CLASS/"),
        (["--data", "digits", "--set", "epoch=3"], "a recipe has no 'epoch'"),
        (["--data", "digits", "--set", "epochs=three"], "expected a whole number"),
        (["--data", "digits", "--set", "epochs"], "expected FIELD=VALUE"),
        (["--data", "digits", "--set", "sizes=0.5:24"], "from share 0 up"),
        (["--data", "digits", "--set", "lr=-1"], "above 0"),
        (["--data", "digits", "--smoke", "--ablate", "magic"], "no trick 'magic'"),
        (["--data", "digits", "--cpu", "--ablate"], "--ablate is for a GPU"),
        (["--data", "digits", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--data", "digits", "--smoke", "--set", "batch=100000"], "needs as many training images"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["cifar_speedrun.py", *arguments])
    assert cifar_speedrun.main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert told in lines[0]
