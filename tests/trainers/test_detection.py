"""Detection: what is read, which weights the detector starts from, and that all of it is trained."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from pipelines.sources import DataError
from tests.trainers.drawn_objects import COLOURS, draw, voc_xml, write_coco, write_voc
from trainers.detection import models
from trainers.detection.data import (
    DetectionSet,
    Objects,
    TrainingImages,
    load_image,
    read_coco,
    read_voc,
    training_batches,
)
from trainers.detection.models import Sizes, build_detector
from trainers.detection.training import Schedule, coco_precision, fine_tune
from trainers.encoders import EncoderConfig, build_encoder
from trainers.features import FrozenEncoder

pytestmark = pytest.mark.usefixtures("narrow")
CPU = torch.device("cpu")
SMALL = Sizes((64,), 128, regions=4, test_regions=4)


def encoder(arch: str, stem: str = "imagenet", seed: int = 0) -> FrozenEncoder:
    """With BatchNorm statistics, scales and shifts that are not those of a new network."""
    torch.manual_seed(seed)
    config = EncoderConfig.model_validate({"arch": arch, "stem": stem})
    module = build_encoder(config, 64)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.weight.data, part.bias.data, part.running_mean, part.running_var):
                value += 0.1 * torch.rand_like(value) - 0.05
    return FrozenEncoder("e", module, 64, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), "e", Path("."), config)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pyramid's fourteen million weights, a few."""
    monkeypatch.setattr(models, "PYRAMID", 32)
    monkeypatch.setattr(models, "CONNECTED", 64)


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trees")
    write_voc(root / "voc", 6, 4)
    write_coco(root / "coco", 6, 4)
    return root


def test_both_formats_say_the_same(trees: Path) -> None:
    voc = read_voc(trees / "voc", ["VOC2007/trainval"])
    coco = read_coco(trees / "coco", ["train2017"])
    assert voc.classes == ("brick", "pool")
    assert coco.classes == ("pool", "brick"), "by id"
    assert len(voc.images) == len(coco.images) == 6
    for one, other in zip(voc.images, coco.images, strict=True):
        assert torch.equal(one.boxes, other.boxes)
        assert torch.equal(one.labels, 3 - other.labels)
        assert torch.equal(load_image(one.image), load_image(other.image))
    one = voc.images[0]
    left, top, right, bottom = one.boxes[0].int().tolist()
    inside = load_image(one.image)[:, top:bottom, left:right]
    colour = torch.tensor(COLOURS[voc.classes[int(one.labels[0]) - 1]])[:, None, None] / 255
    for edge in (inside[:, 0], inside[:, -1], inside[:, :, 0], inside[:, :, -1]):
        assert (edge - colour[:, 0]).abs().mean() < 0.12, "the box is the coloured rectangle, to the last pixel"


def test_difficult_objects_and_crowds_are_ignored(tmp_path: Path) -> None:
    drawn = draw(tmp_path / "VOC2007/JPEGImages", 2, 0)
    for folder in ("Annotations", "ImageSets/Main"):
        (tmp_path / "VOC2007" / folder).mkdir(parents=True)
    (tmp_path / "VOC2007/ImageSets/Main/trainval.txt").write_text("".join(f"{stem}\n" for stem, _ in drawn))
    for difficult, (stem, _) in enumerate(drawn):
        objects = [("pool", [0, 0, 10, 10], difficult), ("pool", [5, 5, 20, 30], 1)]
        (tmp_path / f"VOC2007/Annotations/{stem}.xml").write_text(voc_xml(objects))
    found = read_voc(tmp_path, ["VOC2007/trainval"])
    assert [one.ignored.tolist() for one in found.images] == [[False, True], [True, True]]
    kept = found.trainable()
    assert [one.boxes.tolist() for one in kept.images] == [[[0, 0, 10, 10]]]
    assert found.images[0].target()["iscrowd"].tolist() == [0, 1]


def test_flips_mirror_image_and_boxes(trees: Path) -> None:
    found = read_voc(trees / "voc", ["VOC2007/trainval"])
    images = TrainingImages(found.images)
    (plain, target), (flipped, mirrored) = images[0, False], images[0, True]
    for box, other in zip(target["boxes"].int().tolist(), mirrored["boxes"].int().tolist(), strict=True):
        cut = plain[:, box[1] : box[3], box[0] : box[2]]
        assert torch.equal(cut.flip(-1), flipped[:, other[1] : other[3], other[0] : other[2]])


def test_batches_show_every_image_once_an_epoch() -> None:
    rows = [row for batch in training_batches(7, 3, 14, seed=1) for row, _ in batch]
    assert all(sorted(rows[first : first + 7]) == list(range(7)) for first in range(0, 42, 7))
    assert rows[:7] != rows[7:14]
    flips = [flip for batch in training_batches(7, 50, 40, seed=1) for _, flip in batch]
    assert 0.45 < sum(flips) / len(flips) < 0.55
    assert list(training_batches(7, 3, 5, seed=1)) == list(training_batches(7, 3, 5, seed=1))


@pytest.mark.parametrize("model", ["c4", "fpn"])
def test_the_detector_starts_from_the_encoder_bit_for_bit(model: str) -> None:
    start = encoder("resnet18")
    assert start.module is not None
    detector = build_detector(start, model, 3, SMALL)
    own = {
        name.removeprefix("backbone.").removeprefix("body.").removeprefix("roi_heads.box_head."): value
        for name, value in detector.state_dict().items()
    }
    for name, value in start.module.state_dict().items():
        assert torch.equal(own[name], value), name
    assert detector.transform.image_mean == [0.4, 0.5, 0.6]
    assert detector.transform.image_std == [0.2, 0.3, 0.25]
    assert all(value.requires_grad for value in detector.parameters())
    assert detector.roi_heads.box_predictor.cls_score.out_features == 4
    other = build_detector(start, model, 3, SMALL).state_dict()
    assert all(torch.equal(other[name], value) for name, value in detector.state_dict().items())


@pytest.mark.parametrize(
    ("arch", "stem"), [("resnet8x4", "imagenet"), ("resnet8x4", "small"), ("resnet50", "imagenet")]
)
def test_the_trunk_gives_what_the_encoder_gives(arch: str, stem: str) -> None:
    start = encoder(arch, stem)
    assert start.module is not None
    detector = build_detector(start, "fpn", 2, SMALL).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = list(detector.backbone.body(images).values())
        torch.testing.assert_close(maps[-1].mean((2, 3)), start.module.eval()(images))
        if arch == "resnet50":  # one region, the whole map
            c4 = build_detector(start, "c4", 2, SMALL, extra_norm=False).eval()
            torch.testing.assert_close(c4.roi_heads.box_head(c4.backbone(images)), start.module(images))


def test_anchors_follow_the_strides() -> None:
    usual = build_detector(encoder("resnet18"), "fpn", 2, SMALL)
    assert usual.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    c4 = build_detector(encoder("resnet18"), "c4", 2, SMALL)
    assert c4.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)
    small = build_detector(encoder("resnet18", "small"), "c4", 2, SMALL)
    assert small.rpn.anchor_generator.sizes == ((8, 16, 32, 64, 128),)


@pytest.mark.parametrize("model", ["c4", "fpn"])
def test_a_step_moves_every_layer_and_not_the_encoder(model: str, trees: Path) -> None:
    start = encoder("resnet18")
    assert start.module is not None
    kept = {name: value.clone() for name, value in start.module.state_dict().items()}
    data = read_voc(trees / "voc", ["VOC2007/trainval"]).trainable()
    detector = build_detector(start, model, 2, SMALL)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    fine_tune(detector, data, Schedule(2, 2, 0.01, 0, ()), CPU, seed=0)
    still = [name for name, value in detector.state_dict().items() if torch.equal(value, before[name])]
    assert not still
    assert all(torch.equal(value, kept[name]) for name, value in start.module.state_dict().items())


def test_what_is_frozen_stays(trees: Path) -> None:
    data = read_voc(trees / "voc", ["VOC2007/trainval"]).trainable()
    detector = build_detector(encoder("resnet8x4"), "fpn", 2, SMALL, train_batchnorm=False, freeze=2)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in detector.modules())
    assert any(isinstance(part, FrozenBatchNorm2d) for part in detector.modules())
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    fine_tune(detector, data, Schedule(1, 2, 0.01, 0, ()), CPU, seed=0)
    moved = {name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])}
    expected = {
        name
        for name, value in detector.named_parameters()
        if not name.startswith(("backbone.body.conv1.", "backbone.body.layer1."))
    }
    assert moved == expected


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(DataError, match=r"c4 needs an encoder with layer4; e ends with layer3; use model=fpn"):
        build_detector(encoder("resnet8x4"), "c4", 2, SMALL)
    with pytest.raises(DataError, match="raw pixels have none"):
        build_detector(replace(encoder("resnet8x4"), module=None), "fpn", 2, SMALL)
    with pytest.raises(DataError, match="freeze=4"):
        build_detector(encoder("resnet8x4"), "fpn", 2, SMALL, freeze=4)


def test_the_rate_climbs_and_falls() -> None:
    schedule = Schedule(100, 16, 0.02, 10, (75, 92))
    rates = [schedule.rate(iteration) for iteration in (0, 5, 10, 74, 75, 91, 92)]
    assert rates == pytest.approx([2e-5, 0.01001, 0.02, 0.02, 0.002, 0.002, 0.0002])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_weights(trees: Path, workers: int) -> None:
    data = read_voc(trees / "voc", ["VOC2007/trainval"]).trainable()
    ends = []
    for count, seed in ((0, 3), (workers, 3), (0, 4)):
        detector = build_detector(encoder("resnet8x4"), "fpn", 2, SMALL)
        losses = fine_tune(detector, data, Schedule(2, 2, 0.01, 0, ()), CPU, seed=seed, workers=count)
        ends.append((losses, detector.state_dict()))
    assert ends[0][0] == ends[1][0] != ends[2][0]
    assert all(torch.equal(value, ends[1][1][name]) for name, value in ends[0][1].items())


class Answers(nn.Module):
    """A detector that says what it is told, image by image."""

    def __init__(self, answers: list[dict[str, torch.Tensor]]) -> None:
        super().__init__()
        self.answers, self.transform = iter(answers), nn.Module()

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [next(self.answers)]


def test_average_precision_of_known_answers(trees: Path) -> None:
    """Right boxes give 100; half of each box (overlap 1/2) counts at 0.50 alone: a tenth of AP; what covers an ignored
    object is no mistake; what covers nothing is."""
    pytest.importorskip("pycocotools", reason="pycocotools is not installed (pip install 'twinstream[detect]')")
    path = read_voc(trees / "voc", ["VOC2007/trainval"]).images[0].image
    boxes = torch.tensor([[0.0, 0, 40, 40], [50, 50, 90, 90]])
    labels, ignored = torch.tensor([1, 1]), torch.tensor([False, False])
    truth = [Objects(path, boxes, labels, ignored)] * 3

    def ap(images: list[Objects], found: torch.Tensor, scores: list[float]) -> tuple[float, float, float]:
        answer = {"boxes": found, "labels": torch.ones(len(found), dtype=torch.int64), "scores": torch.tensor(scores)}
        got = coco_precision(Answers([answer] * len(images)), images, 2, CPU, 96)
        assert got.per_class[1] is None, "a class without objects"
        return got.ap, got.ap50, got.ap75

    assert ap(truth, boxes, [0.9, 0.8]) == pytest.approx((100, 100, 100))
    halves = boxes * torch.tensor([1.0, 1, 1, 1]) + torch.tensor([[0.0, 0, 0, -20], [0, 0, 0, -20]])
    assert ap(truth, halves, [0.9, 0.8]) == pytest.approx((10, 100, 0))
    difficult = [Objects(path, boxes, labels, torch.tensor([True, False]))] * 3
    assert ap(difficult, boxes, [0.9, 0.8]) == pytest.approx((100, 100, 100))
    none_there = [Objects(path, boxes[1:], labels[1:], ignored[1:])] * 3
    assert ap(none_there, boxes, [0.9, 0.8])[1] == pytest.approx(50, abs=0.5)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda root: (root / "voc/VOC2007/ImageSets/Main/trainval.txt").unlink(), r"trainval\.txt"),
        (lambda root: (root / "voc/VOC2007/Annotations/000000.xml").write_text("<"), r"000000\.xml"),
        (
            lambda root: (root / "voc/VOC2007/Annotations/000000.xml").write_text(
                voc_xml([("pool", [10, 10, 10, 20], 0)])
            ),
            r"000000\.xml has a box without an area",
        ),
        (
            lambda root: (root / "voc/VOC2007/Annotations/000000.xml").write_text(
                "<annotation><object><name>pool</name></object></annotation>"
            ),
            r"000000\.xml",
        ),
        (lambda root: (root / "coco/annotations/instances_train2017.json").write_text("{"), r"train2017\.json"),
        (lambda root: (root / "coco/annotations/instances_train2017.json").write_text("{}"), "no 'categories'"),
        (
            lambda root: (root / "coco/annotations/instances_train2017.json").write_text(
                json.dumps({"categories": [{"id": 1, "name": "x"}], "images": [], "annotations": []})
            ),
            "no image has an object",
        ),
    ],
)
def test_damaged_trees_are_named(tmp_path: Path, damage: Callable[[Path], object], expected: str) -> None:
    write_voc(tmp_path / "voc", 2, 1)
    write_coco(tmp_path / "coco", 2, 1)

    def read() -> None:
        read_voc(tmp_path / "voc", ["VOC2007/trainval"])
        read_coco(tmp_path / "coco", ["train2017"])

    read()
    damage(tmp_path)
    with pytest.raises(DataError, match=expected):
        read()


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("no image")
    one = Objects(tmp_path / "x.jpg", torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([1]), torch.tensor([False]))
    with pytest.raises(DataError, match=r"x\.jpg"):
        fine_tune(
            build_detector(encoder("resnet8x4"), "fpn", 1, SMALL),
            DetectionSet([one], ("a",)),
            Schedule(1, 1, 0.01, 0, ()),
            CPU,
            seed=0,
        )
