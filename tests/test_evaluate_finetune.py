"""``evaluate.py finetune`` as a user runs it, and lists of image names in every protocol that takes labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from tests.test_evaluate import evaluate, last_line
from trainers.encoders import EncoderConfig, build_encoder

QUICK = ("labels=2-per-class", "epochs=1", "data.holdout=0.03")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported encoder that nobody trained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("export") / "encoder.safetensors"
    about = {"arch": "resnet8x4", "stem": "auto", "image_size": 8, "mean": [0.3] * 3, "std": [0.4] * 3}
    encoder = build_encoder(EncoderConfig(arch="resnet8x4"), 8)
    save_file(encoder.state_dict(), path, metadata={"twinstream": json.dumps(about)})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 digits as PNG files: class folders in train/ and val/, and a list of 24 of the training images."""
    root = tmp_path_factory.mktemp("images")
    images, labels = load_digits(return_X_y=True)
    names = []
    for index in range(300):
        pixels = (images[index].reshape(8, 8) * 15.9).astype(np.uint8)
        path = root / ("val" if index % 5 == 0 else "train") / str(labels[index]) / f"{labels[index]}_{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).convert("RGB").save(path)
        if index % 10 == 3:
            names.append(path.name)
    (root / "listed.txt").write_text("\n".join(names[:24]) + "\n")
    return root


def test_the_table_the_json_line_and_the_record(tmp_path: Path, weights: Path) -> None:
    before = load_file(weights)
    done = evaluate(tmp_path, "finetune", str(weights), "--data", "digits", *QUICK, "seeds=2", "patience=1")
    record = last_line(done)
    assert (record["protocol"], record["metric"], record["n_test"]) == ("finetune", "top1", 360)
    assert record["value"] == record["top1"]
    assert record["top5"] >= record["top1"]
    assert (record["labels"], record["initial"]) == ("2-per-class", "pretrained")
    assert record["gain_over_scratch"] == pytest.approx(record["top1"] - record["scratch_top1"])
    for words in (
        "20 labelled images",
        "1 epochs of 1 steps",
        "Nesterov momentum 0.9",
        "held-out part (43 labelled images)",
        "360 test",
    ):
        assert words in record["description"]
    for words in ("pretrained", "scratch", "mean", " ± ", "kept in"):
        assert words in done.stdout
    assert "s left" in done.stderr
    assert "s left" not in done.stdout
    (kept,) = (weights.parent / "evaluations").glob("finetune-digits-2-per-class-*.json")
    written = json.loads(kept.read_text())
    assert [run["labels"] for run in written["runs"]] == [20, 20]
    assert [len(run["history"]) for run in written["scratch"]["runs"]] == [1, 1]
    for picture in ("confusion", "curves"):
        assert (kept.parent / written["pictures"][picture]).read_bytes().startswith(b"\x89PNG")
    assert all(torch.equal(value, before[name]) for name, value in load_file(weights).items())


def test_a_random_baseline_is_the_scratch_start_alone(tmp_path: Path) -> None:
    arguments = ("finetune", "--baseline", "random", "--data", "digits", "encoder.arch=resnet8x4", *QUICK, "seeds=1")
    record = last_line(evaluate(tmp_path, *arguments, "optimizer=adam"))
    assert record["initial"] == "scratch"
    assert "scratch_top1" not in record
    assert "Adam" in record["description"]


def test_a_list_of_names_is_taken_whole_by_every_protocol(tmp_path: Path, weights: Path, folder: Path) -> None:
    listed = (f"labels={folder / 'listed.txt'}", "data.source=folder", f"data.root={folder}")
    for protocol, settings in {"finetune": ("epochs=1", "initial=pretrained"), "knn": ("k=[3]",), "linear": ()}.items():
        done = evaluate(tmp_path, protocol, str(weights), *listed, *settings)
        record = last_line(done)
        kept = next((weights.parent / "evaluations").glob(f"{protocol}-folder-listed-*.json"))
        (run,) = json.loads(kept.read_text())["runs"]
        assert run["labels"] == 24, "also those that data.holdout would have kept back"
        assert record["n_test"] == 60
        # 24 of 240 are held out, as ever, and those on the list are not used to choose
        held: Any = record["description"].partition("held-out part (")[2].split(" ")[0]
        assert 15 < int(held) < 24
    published = evaluate(tmp_path, "finetune", str(weights), *listed, "epochs=1", "data.holdout=0")
    assert "nothing being held out" in last_line(published)["description"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--baseline", "pixels"], "raw pixels have no weights"),
        (["--baseline", "random", "initial=pretrained"], "initial=pretrained"),
        (["--baseline", "random", "lr=0.1"], "there is no such key"),
        (["--baseline", "random", "lr_body=0.1"], "lr_body=0.1"),
        (["--baseline", "random", "lr_head=[0]"], "lr_head.0=0"),
        (["--baseline", "random", "lr_head=[]"], "lr_head=[]"),
        (["--baseline", "random", "optimizer=lamb"], "choose from sgd, adam, lars"),
        (["--baseline", "random", "optimizer=adam", "momentum=0.5"], "momentum is not used by adam"),
        (["--baseline", "random", "batch_size=1"], "batch_size=1"),
        (["--baseline", "random", "crop_scale=[0.5, 2]"], "crop_scale"),
        (["--baseline", "random", "data.holdout=0", "patience=3"], "data.holdout"),
        (["--baseline", "random", "data.holdout=0", "lr_body=[0.1, 0.2]"], "one value each"),
        (["--baseline", "random", "labels=absent.txt"], "absent.txt"),
        (["--baseline", "random", "labels=500-per-class"], "500"),
        (["--baseline", "random", "select_on=0"], "select_on=0"),
    ],
)
def test_mistakes_end_in_one_readable_message(tmp_path: Path, arguments: list[str], expected: str) -> None:
    arch = ["encoder.arch=resnet8x4"] if "random" in arguments else []
    done = evaluate(tmp_path, "finetune", "--data", "digits", *arch, *arguments)
    assert done.exit_code == 2, done.output
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")
