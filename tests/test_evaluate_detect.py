"""``evaluate.py detect`` on images of two kinds of rectangles."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.test_evaluate import evaluate, last_line
from tests.trainers.drawn_objects import write_coco, write_voc
from trainers.detection import models
from trainers.encoders import EncoderConfig, build_encoder
from trainers.protocols import detect

pytest.importorskip("pycocotools", reason="pycocotools is not installed (pip install 'twinstream[detect]')")
SIDE = 96
FAST = ["model=fpn", "workers=0", f"sides=[{SIDE}]", f"test_side={SIDE}", "regions=32", "test_regions=40", "warmup=10"]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "PYRAMID", 64)
    monkeypatch.setattr(models, "CONNECTED", 128)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    write_voc(root / "voc", 40, 20)
    write_coco(root / "coco", 4, 3)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(arch="resnet8x4", stem="imagenet"), SIDE)
    path = tmp_path_factory.mktemp("export") / "encoder.safetensors"
    about = {"arch": "resnet8x4", "stem": "imagenet", "image_size": SIDE, "mean": [0.45] * 3, "std": [0.25] * 3}
    save_file(encoder.state_dict(), path, metadata={"twinstream": json.dumps(about)})
    return path


def test_objects_are_found_after_a_short_training(tmp_path: Path, trees: Path, weights: Path) -> None:
    arguments = [f"root={trees / 'voc'}", "train=[VOC2007/trainval]", "batch_size=4", "lr=0.02", *FAST]
    untrained = last_line(evaluate(tmp_path, "detect", str(weights), *arguments, "iterations=1"))
    trained = last_line(evaluate(tmp_path, "detect", str(weights), *arguments, "iterations=60"))
    assert trained["ap50"] > max(70, untrained["ap50"] + 50)  # 97 and 7 when this was written
    assert trained["ap50"] >= trained["ap"]


def test_coco_and_what_is_said_of_it(tmp_path: Path, trees: Path, weights: Path) -> None:
    done = evaluate(
        tmp_path, "detect", str(weights), "format=coco", f"root={trees / 'coco'}", "iterations=2", "batch_size=2", *FAST
    )
    record = last_line(done)
    assert (record["protocol"], record["metric"], record["n_test"]) == ("detect", "ap", 3)
    assert record["value"] == record["ap"]
    assert (record["data"], record["model"], record["initial"]) == ("coco", "fpn", "encoder")
    for words in ("4 images of train2017", "2 iterations of 2 images", "lr 0.0025", "all 3 images of val2017"):
        assert words in record["description"]
    assert "iteration 2 of 2" in done.stderr
    kept = json.loads(next(weights.parent.glob("evaluations/detect-coco-*.json")).read_text())
    assert set(kept["per_class"]) == {"brick", "pool"}
    assert len(kept["losses"]) == 2
    assert (weights.parent / "evaluations" / kept["pictures"]["loss"]).exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model=c4"], "needs an encoder with layer4"),
        (["model=yolo"], "model='yolo'"),
        (["root=nowhere"], "nowhere/VOC2007/ImageSets/Main/trainval.txt"),
        (["test=VOC2007/trainval"], "test=VOC2007/trainval is among the parts to train on"),
        (["test=VOC2007//trainval"], "test images are among those to train on"),
        (["test=VOC2007/val"], "VOC2007/ImageSets/Main/val.txt"),
        (["format=coco"], "instances_train2017.json"),
        (["longest=64"], "longest=64 is below"),
        (["freeze=4"], "freeze=4 leaves nothing"),
        (["iterations=0"], "iterations=0"),
        (["decay=[2]"], "decay.0=2"),
        (["sides=[8]"], "sides.0=8"),
        (["iteration=3"], "did you mean iterations?"),
    ],
)
def test_mistakes_end_in_one_readable_message(
    tmp_path: Path, trees: Path, weights: Path, arguments: list[str], expected: str
) -> None:
    usual = [f"root={trees / 'voc'}", *FAST]
    if "format=coco" not in arguments:
        usual.append("train=[VOC2007/trainval]")
    done = evaluate(tmp_path, "detect", str(weights), *usual, *arguments)
    assert done.exit_code == 2, done.output
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")


def test_an_image_that_is_missing_is_found_out_before_training(tmp_path: Path, weights: Path) -> None:
    write_voc(tmp_path / "voc", 4, 3)
    gone = sorted((tmp_path / "voc/VOC2007/JPEGImages").iterdir())[-1]
    gone.unlink()
    usual = [f"root={tmp_path / 'voc'}", "train=[VOC2007/trainval]", *FAST]
    done = evaluate(tmp_path, "detect", str(weights), *usual)
    assert done.exit_code == 2, done.output
    assert f"{gone}, which is not there" in done.stderr
    assert "iteration" not in done.stderr


def test_pixels_and_a_loss_that_runs_away_are_refused(tmp_path: Path, trees: Path, weights: Path) -> None:
    arguments = [f"root={trees / 'voc'}", "train=[VOC2007/trainval]", "batch_size=2", *FAST]
    done = evaluate(tmp_path, "detect", "--baseline", "pixels", "--data", "digits", *arguments)
    assert done.exit_code == 2
    assert "raw pixels have none" in done.stderr
    done = evaluate(tmp_path, "detect", str(weights), *arguments, "lr=1e12", "warmup=0", "iterations=3")
    assert done.exit_code == 2, done.output
    assert "lower lr" in done.stderr


def test_without_its_extra_it_says_what_to_install(
    tmp_path: Path, trees: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "find_spec", lambda name: None)
    done = evaluate(tmp_path, "detect", str(weights), f"root={trees / 'voc'}", *FAST)
    assert done.exit_code == 2
    assert "pip install 'twinstream[detect]'" in done.stderr
