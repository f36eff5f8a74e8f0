"""Crops against torchvision's resized_crop, in both forms: the compiled one (CPU) and the matrix one
(GPU)."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

import kernels.crop
from kernels import crop_resize

CIFAR = Path(__file__).parents[2] / "data" / "cifar10-jpeg"
Crop = Callable[..., Tensor]


@cache
def photos() -> Tensor:
    """[2, 427, 640, 3]"""
    return torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])


@cache
def digits() -> Tensor:
    gray = (torch.from_numpy(load_digits().images[:64]) * 255 / 16).to(torch.uint8)
    return gray.unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()  # [64, 8, 8, 3]


@pytest.fixture(params=["compiled", "matmul"])
def crop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Crop:
    if request.param == "matmul":
        monkeypatch.setattr(kernels.crop, "_crop_compiled", kernels.crop._crop_matmul)
    return crop_resize


def torchvision_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Explicitly padded, then cropped and resized, one at a time."""
    crops = []
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        rows, columns = image.shape[:2]
        pad = [max(-left, 0), max(-top, 0), max(left + width - columns, 0), max(top + height - rows, 0)]
        padded = functional.pad(image.permute(2, 0, 1), pad)
        box = (top + pad[1], left + pad[0], height, width)
        crops.append(functional.resized_crop(padded, *box, [size, size], antialias=True).permute(1, 2, 0))
    return torch.stack(crops)


def random_boxes(count: int, height: int, width: int, outside: int = 0, smallest: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(count + height)
    corners = []
    for extent in (height, width):
        ends = torch.randint(-outside, extent + outside + 1, (count, 2), generator=generator)
        ends = ends.sort(dim=1).values
        start = ends[:, 0].clamp(max=extent + outside - smallest)
        corners.append((start, (ends[:, 1] - start).clamp(min=smallest)))
    (top, box_height), (left, box_width) = corners
    return torch.stack([top, left, box_height, box_width], dim=1)


def check(ours: Tensor, theirs: Tensor) -> None:
    """torchvision rounds between its two passes too, so a pixel may differ by one."""
    assert ours.dtype == torch.uint8
    assert ours.shape == theirs.shape
    error = (ours.int() - theirs.int()).abs().float()
    assert error.max() <= 1
    assert error.mean() <= 0.25


@pytest.mark.parametrize("size", [1, 32, 33, 96, 224])
def test_photos(crop: Crop, size: int) -> None:
    boxes = random_boxes(24, 427, 640)
    rows = torch.arange(24) % 2
    check(crop(photos(), boxes, size, rows=rows), torchvision_crops(photos()[rows], boxes, size))


@pytest.mark.parametrize("size", [5, 8, 32])
def test_digits(crop: Crop, size: int) -> None:
    boxes = random_boxes(64, 8, 8)
    check(crop(digits(), boxes, size), torchvision_crops(digits(), boxes, size))


def test_cifar(crop: Crop) -> None:
    files = sorted(CIFAR.rglob("*.jp*g"))[:200] if CIFAR.is_dir() else []
    if not files:
        pytest.skip("no CIFAR-10 JPEGs in data/cifar10-jpeg")
    images = torch.stack([decode_image(str(f), ImageReadMode.RGB).permute(1, 2, 0) for f in files])
    boxes = random_boxes(len(images), 32, 32)
    check(crop(images, boxes, 32), torchvision_crops(images, boxes, 32))


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 427, 640],  # whole
        [0, 0, 200, 300],  # corners and borders
        [227, 340, 200, 300],
        [426, 639, 1, 1],  # one pixel
        [0, 0, 1, 1],
        [213, 0, 1, 640],  # extreme ratios
        [0, 320, 427, 1],
        [10, 20, 64, 64],  # no resize
        [10, 20, 63, 65],
    ],
)
def test_special_boxes(crop: Crop, box: list[int]) -> None:
    boxes = torch.tensor([box] * 2)
    check(crop(photos(), boxes, 64), torchvision_crops(photos(), boxes, 64))


@pytest.mark.parametrize("size", [16, 32, 200])
def test_outside_the_image_is_black(crop: Crop, size: int) -> None:
    small = functional.resize(photos().permute(0, 3, 1, 2), [32, 40]).permute(0, 2, 3, 1)
    boxes = torch.cat(
        [
            random_boxes(30, 32, 40, outside=8),
            torch.tensor([[-4, -4, 32, 40], [4, 4, 32, 40], [-3, 5, 40, 20], [-50, -50, 200, 200]]),
        ]
    )
    rows = torch.arange(len(boxes)) % 2
    check(crop(small, boxes, size, rows=rows), torchvision_crops(small[rows], boxes, size))
    nowhere = torch.tensor([[-90, 0, 32, 32], [0, -90, 32, 32], [90, 0, 9, 9], [0, 90, 9, 9]])
    assert crop(small, nowhere, size, rows=torch.zeros(4, dtype=torch.int64)).max() == 0


def test_padding_without_resize_is_exact(crop: Crop) -> None:
    small = functional.resize(photos().permute(0, 3, 1, 2), [32, 32]).permute(0, 2, 3, 1)
    boxes = torch.tensor([[-4, 3, 32, 32], [2, -1, 32, 32]])
    assert torch.equal(crop(small, boxes, 32), torchvision_crops(small, boxes, 32))


def test_canvas_beyond_the_true_size_is_never_seen(crop: Crop) -> None:
    canvas = torch.full((3, 90, 120, 3), 255, dtype=torch.uint8)
    sizes = torch.tensor([[60, 80], [90, 50], [33, 120]])
    for image, (height, width) in zip(canvas, sizes.tolist(), strict=True):
        image[:height, :width] = photos()[0, :height, :width]
    rows = torch.arange(30) % 3
    boxes = random_boxes(30, 70, 90, outside=10)
    expected = [
        torchvision_crops(canvas[r, : sizes[r, 0], : sizes[r, 1]][None], box[None], 24)
        for r, box in zip(rows.tolist(), boxes, strict=True)
    ]
    check(crop(canvas, boxes, 24, rows=rows, sizes=sizes[rows]), torch.cat(expected))


def test_identity_is_the_input() -> None:
    images = digits()
    whole = torch.tensor([0, 0, 8, 8]).expand(len(images), 4)
    assert crop_resize(images, whole, 8) is images
    rows = torch.tensor([5, 2, 2])
    assert torch.equal(crop_resize(images, whole[:3], 8, rows=rows), images[rows])
    assert crop_resize(images, whole[:0], 8, rows=rows[:0]).shape == (0, 8, 8, 3)


def test_the_two_forms_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, rows = random_boxes(40, 427, 640, outside=20), torch.arange(40) % 2
    compiled = crop_resize(photos(), boxes, 48, rows=rows)
    monkeypatch.setattr(kernels.crop, "_crop_compiled", kernels.crop._crop_matmul)
    matmul = crop_resize(photos(), boxes, 48, rows=rows)
    assert (compiled.int() - matmul.int()).abs().max() <= 1
    assert (compiled != matmul).float().mean() < 1e-3  # halves that round apart
    monkeypatch.setattr(kernels.crop, "_CHUNK_BYTES", 1)
    assert torch.equal(crop_resize(photos(), boxes, 48, rows=rows), matmul)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(crop_resize(photos(), boxes, 48, rows=rows), matmul)


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, rows = random_boxes(41, 427, 640), torch.arange(41) % 2
    alone = crop_resize(photos(), boxes, 32, rows=rows)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(crop_resize(photos(), boxes, 32, rows=rows), alone)


def test_layout_does_not_matter() -> None:
    planar = photos().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    boxes = random_boxes(2, 427, 640)
    assert torch.equal(crop_resize(planar, boxes, 32), crop_resize(photos(), boxes, 32))


BOX = torch.tensor([[0, 0, 8, 8]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": digits().float()}, "images"),
        ({"images": digits()[0]}, "images"),
        ({"boxes": BOX.int()}, "boxes"),
        ({"boxes": BOX}, "1 boxes for 64 images"),
        ({"size": 0}, "size"),
        ({"boxes": torch.tensor([[0, 0, 0, 8]]), "rows": torch.tensor([0])}, "heights and widths from 1"),
        ({"boxes": BOX, "rows": torch.tensor([64])}, "rows: expected 0 to 63"),
        ({"boxes": BOX, "rows": torch.tensor([-1])}, "rows"),
        ({"boxes": BOX, "rows": torch.tensor([0, 1])}, "rows"),
        ({"sizes": torch.tensor([[9, 8]]).expand(64, 2)}, "canvas"),
        ({"sizes": torch.tensor([[8, 8]])}, "sizes"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    given = {"images": digits(), "boxes": BOX.expand(64, 4), "size": 8} | arguments
    with pytest.raises(ValueError, match=message):
        crop_resize(**given)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    boxes, rows = random_boxes(40, 427, 640, outside=20), torch.arange(40) % 2
    expected = crop_resize(photos(), boxes, 48, rows=rows)
    ours = crop_resize(photos().cuda(), boxes, 48, rows=rows).cpu()
    assert (ours.int() - expected.int()).abs().max() <= 1
    assert (ours != expected).float().mean() < 1e-3
