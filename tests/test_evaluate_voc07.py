"""``evaluate.py voc07`` on a small tree in VOC's format: squares of the colours of four classes."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipelines.sources import DataConfig, open_source
from pipelines.stored.trees import VOC_CLASSES
from tests.test_evaluate import evaluate, last_line
from trainers.encoders import EncoderConfig, build_encoder
from trainers.features import load_encoder
from trainers.protocols import Job, voc07

COLOURS = {"aeroplane": (90, 160, 255), "cat": (255, 120, 30), "dog": (40, 200, 60), "person": (230, 60, 220)}
SIZE = 16
FAST = ["costs=[0.1, 10]", "l2=[0.01, 1]"]


def write_voc(root: Path, trainval: int, test: int, *, seed: int = 0, shuffled: bool = False) -> None:
    """Each class is in an image with probability 0.3, somewhere; one object in ten is difficult, and not painted."""
    rng = np.random.default_rng(seed)
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    stems = [f"{number:06d}" for number in range(trainval + test)]
    objects = []
    for stem in stems:
        pixels = rng.integers(60, 140, (40, 40, 3)).astype(np.uint8)
        found = []
        for name, colour in COLOURS.items():
            if rng.random() < 0.3:
                difficult = rng.random() < 0.1
                top, left = rng.integers(4, 20, 2)
                if not difficult:
                    pixels[top : top + 14, left : left + 14] = colour
                found.append((name, int(difficult)))
        Image.fromarray(pixels).save(base / "JPEGImages" / f"{stem}.jpg", quality=95)
        objects.append(found)
    if shuffled:
        random.Random(seed).shuffle(objects)
    for stem, found in zip(stems, objects, strict=True):
        body = "".join(f"<object><name>{n}</name><difficult>{d}</difficult></object>" for n, d in found)
        (base / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{body}</annotation>")
    (base / "ImageSets/Main/trainval.txt").write_text("\n".join(stems[:trainval]) + "\n")
    (base / "ImageSets/Main/test.txt").write_text("\n".join(stems[trainval:]) + "\n")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("voc")
    write_voc(root, 150, 100)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(arch="resnet8x4"), SIZE)
    path = tmp_path_factory.mktemp("export") / "encoder.safetensors"
    about = {"arch": "resnet8x4", "stem": "auto", "image_size": SIZE, "mean": [0.45] * 3, "std": [0.25] * 3}
    save_file(encoder.state_dict(), path, metadata={"twinstream": json.dumps(about)})
    return path


def test_classes_that_can_be_seen_are_found(tmp_path: Path, tree: Path, weights: Path) -> None:
    done = evaluate(tmp_path, "voc07", str(weights), "--data", "voc07", f"data.root={tree}", *FAST)
    record = last_line(done)
    assert (record["protocol"], record["metric"], record["n_test"]) == ("voc07", "map11", 100)
    assert record["value"] == record["svm_map11"]
    for name in ("svm_map11", "svm_map", "logistic_map11", "logistic_map"):
        assert record[name] > record["chance"] + 30
    assert 15 < record["chance"] < 40
    assert "left out of the means: bicycle, bird" in done.stdout
    kept = json.loads(next(weights.parent.glob("evaluations/voc07-voc07-*.json")).read_text())
    assert tuple(kept["per_class"]) == VOC_CLASSES, "VOC's order, whatever was found"
    truth = open_source(DataConfig(source="voc07", root=tree), "test").labels
    assert (truth == -1).any()
    for column, name in enumerate(VOC_CLASSES):
        row = kept["per_class"][name]
        assert row["positives"] == int((truth[:, column] == 1).sum())
        assert row["test_images"] == 100 - int((truth[:, column] == -1).sum())
        assert (row["svm_ap11"] is not None) == (name in COLOURS)
    mean = np.mean([kept["per_class"][name]["svm_ap11"] for name in COLOURS])
    assert record["value"] == pytest.approx(mean), "the mean over the classes"
    assert (weights.parent / "evaluations" / kept["pictures"]["per-class"]).stat().st_size > 1000


@pytest.mark.parametrize("baseline", ["pixels", "random"])
def test_baselines_and_the_held_out_part(tmp_path: Path, tree: Path, baseline: str) -> None:
    more = ["size=16", "select=holdout", "data.holdout=0.3", *FAST]
    more += ["encoder.arch=resnet8x4"] if baseline == "random" else []
    record = last_line(
        evaluate(tmp_path, "voc07", "--baseline", baseline, "--data", "voc07", f"data.root={tree}", *more)
    )
    assert record["value"] > record["chance"] + 15
    assert "held-out part (45 of them)" in record["description"]
    assert "150 images" in record["description"], "fitted on what was held out as well"


def test_shuffled_labels_give_chance(tmp_path: Path, weights: Path) -> None:
    write_voc(tmp_path / "voc", 150, 300, shuffled=True)
    root = f"data.root={tmp_path / 'voc'}"
    record = last_line(evaluate(tmp_path, "voc07", str(weights), "--data", "voc07", root, *FAST))
    for name in ("svm_map", "logistic_map"):
        assert abs(record[name] - record["chance"]) < 8


def test_the_encoder_stays_and_test_labels_choose_nothing(
    tree: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DataConfig(source="voc07", root=tree)
    encoder = load_encoder(weights)
    assert encoder.module is not None
    before = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    job = Job(encoder, voc07.Settings(costs=(0.1, 1, 10), l2=(0.01, 1)), data, torch.device("cpu"))
    honest = voc07.score(job)
    after = encoder.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())

    def swapped(config: DataConfig, split: str) -> object:
        source = open_source(config, split)
        return replace(source, labels=source.labels.flip(0)) if split == "test" else source

    monkeypatch.setattr(voc07, "open_source", swapped)
    other = voc07.score(job)
    assert other.value < honest.value - 20
    for name in COLOURS:
        for head in ("svm_strength", "logistic_strength"):
            assert honest.details["per_class"][name][head] == other.details["per_class"][name][head]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.source=digits"], "digits has one label an image"),
        (["select=test"], "select='test'"),
        (["select=holdout", "data.holdout=0"], "data.holdout"),
        (["costs=[]"], "costs=[]"),
        (["costs=[-1]"], "costs.0=-1"),
        (["l2=[0]"], "l2.0=0"),
        (["folds=1"], "folds=1"),
        (["cost=[1]"], "did you mean costs?"),
        (["data.root=nowhere"], "nowhere"),
        (["size=32"], "for --baseline"),
    ],
)
def test_mistakes_end_in_one_readable_message(
    tmp_path: Path, tree: Path, weights: Path, arguments: list[str], expected: str
) -> None:
    done = evaluate(tmp_path, "voc07", str(weights), "--data", "voc07", f"data.root={tree}", *arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr


def test_a_test_set_of_difficult_objects_only_is_refused(tmp_path: Path, weights: Path) -> None:
    write_voc(tmp_path / "voc", 60, 10)
    for stem in range(60, 70):
        path = tmp_path / f"voc/VOCdevkit/VOC2007/Annotations/{stem:06d}.xml"
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    done = evaluate(tmp_path, "voc07", str(weights), "--data", "voc07", f"data.root={tmp_path / 'voc'}", *FAST)
    assert done.exit_code == 2
    assert "nothing can be scored" in done.stderr


def test_a_diverged_encoder_is_refused(tmp_path: Path, tree: Path, weights: Path) -> None:
    with safe_open(weights, "pt") as file:
        about = file.metadata()
    broken = {
        name: value * float("nan") if name == "conv1.weight" else value for name, value in load_file(weights).items()
    }
    save_file(broken, tmp_path / "broken.safetensors", metadata=about)
    done = evaluate(tmp_path, "voc07", "broken.safetensors", "--data", "voc07", f"data.root={tree}", *FAST)
    assert done.exit_code == 2
    assert "not all finite" in done.stderr
