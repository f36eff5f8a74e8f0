"""``evaluate.py uncertainty`` as a user runs it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import log_loss

from pipelines.sources import DataConfig, open_source
from tests.test_evaluate import evaluate, last_line
from tests.trainers.run_folders import write_run
from trainers.features import extract, load_encoder, raw_pixels
from trainers.linear import search_logistic
from trainers.posterior import posterior
from trainers.protocols import Job
from trainers.protocols.uncertainty import Settings, score
from trainers.state import find_checkpoint

DROPOUT = {"name": "probsimclr", "dropout": 0.3, "projector": {"hidden": 32, "output": 12}}
QUICK = ("passes=2", "data.limit=100")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of probabilistic SimCLR with dropout, untrained."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    write_run(folder, DROPOUT)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of another size, in class folders."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 30)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 256, (20, 14, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def kept(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(
        max(folder.glob("uncertainty-*.json"), key=lambda p: p.stat().st_mtime).read_text()
    )
    return record


@pytest.fixture(scope="module")
def record(run: Path, photos: Path) -> dict[str, Any]:
    """The command's last line."""
    foreign = ("ood.source=folder", f"ood.root={photos}")
    return last_line(evaluate(run, "uncertainty", str(run), *QUICK, *foreign, "calibrate=temperature"))


def test_a_run_with_dropout_and_posteriors_against_foreign_images(run: Path, record: dict[str, Any]) -> None:
    assert find_checkpoint(run) is not None, "the checkpoint still has its checksums"
    assert (record["metric"], record["n_test"], record["predictor"], record["ood"]) == ("ece", 360, "dropout", "folder")
    assert record["value"] == record["ece"]
    assert record["temperature"] > 0
    assert record["ece"] != record["ece_before"]
    whole = kept(run / "evaluations")
    assert len(whole["table"]) == len(whole["measures"]) == 10
    for measure in whole["measures"].values():
        assert measure.keys() == {"aurc", "top1_at_80", "top1_at_90", "top1_at_95", "ood_auroc", "ood_fpr95"}
        assert all(0 <= value <= 100 for value in measure.values())
    assert whole["pictures"].keys() == {"reliability", "risk_coverage", "doubts", "images"}
    for name in whole["pictures"].values():
        assert Image.open(run / "evaluations" / name).size[0] > 300
    assert len(whole["feature_variance"]) == 256
    assert min(whole["feature_variance"]) >= 0


def test_posteriors_are_those_of_the_runs_own_projector(run: Path, record: dict[str, Any]) -> None:
    """And the errors that they are to foretell are the classifier's: both put together again by hand."""
    data, encoder = DataConfig(source="digits", limit=100), load_encoder(run)
    splits = [open_source(data, split) for split in ("train", "holdout", "test")]
    rows = [extract(encoder, source, torch.device("cpu")) for source in splits]
    fit = search_logistic(rows[0], splits[0].labels, rows[1], splits[1].labels, 10).best
    wrong = fit.logits(rows[2]).argmax(1) != splits[2].labels
    written = write_run(run.parent / "again", DROPOUT)
    with torch.no_grad():
        found = posterior(written.projector(rows[2]))
    for doubt, name in ((found.entropy, "posterior_entropy"), (1 - found.confidence, "posterior_confidence")):
        assert len(doubt.unique()) == 360
        errors = wrong[doubt.argsort()].double().cumsum(0) / torch.arange(1, 361)
        assert record[f"{name}_aurc"] == pytest.approx(100 * errors.mean().item(), rel=1e-6)


def test_pixels_have_no_dropout_and_get_what_linear_gets(tmp_path: Path) -> None:
    pixels = ("--baseline", "pixels", "--data", "digits", "data.limit=100")
    record = last_line(evaluate(tmp_path, "uncertainty", *pixels))
    linear = last_line(evaluate(tmp_path, "linear", *pixels))
    assert record["top1"] == pytest.approx(linear["top1"])
    assert record["predictor"] == "softmax"
    assert record["ood"] is record["temperature"] is None
    assert not [key for key in record if "mutual" in key or "ood_" in key or "posterior" in key]
    for words in ("no dropout in the encoder, so no mutual information", "no foreign images were given"):
        assert words in record["description"]
    table = kept(tmp_path / "runs/evaluations")["table"]
    assert [row["doubt by"] for row in table][-1] == "dropout: the encoder has none"
    assert set(list(table[-1].values())[1:]) == {"–"}
    assert {row["OOD AUROC (%)"] for row in table} == {"–"}


def test_shuffled_labels_give_chance_and_doubt_that_says_nothing(tmp_path: Path, monkeypatch) -> None:
    data = DataConfig(source="digits", limit=200)
    splits = [open_source(data, split) for split in ("train", "holdout", "test")]
    for number, source in enumerate(splits):
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(number))
        source.labels.copy_(source.labels[order])
    monkeypatch.setattr(Job, "splits", lambda self: tuple(splits))
    monkeypatch.chdir(tmp_path)
    result = score(Job(raw_pixels(splits[0], None), Settings(calibrate="temperature"), data, torch.device("cpu")))
    assert result.scores["top1"] < 17
    assert abs(result.scores["softmax_entropy_aurc"] - (100 - result.scores["top1"])) < 5
    assert result.scores["nll"] == pytest.approx(log_loss([0], [[0.1] * 10], labels=range(10)), abs=0.15)
    assert result.scores["ece"] < 7


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["passes=1"], "passes=1"),
        (["calibrate=platt"], "choose from none, temperature"),
        (["ood=digit"], "unknown data source 'digit'"),
        (["ood.source=folder", "ood.sauce=1"], "did you mean source?"),
        (["ood=digits"], "the very images that are scored"),
        (["ood.source=cifar10", "ood.root=nowhere"], "nowhere"),
        (["ood=cifar10", "ood.root=nowhere"], "ood.source"),
        (["data.holdout=0"], "data.holdout above 0"),
        (["labels=10%"], "labels='10%': there is no such key"),
        (["seed=-1"], "seed=-1"),
    ],
)
def test_mistakes_end_in_one_readable_message(tmp_path: Path, arguments: list[str], expected: str) -> None:
    done = evaluate(tmp_path, "uncertainty", "--baseline", "pixels", "--data", "digits", *arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
