"""Crops of JPEGs against Pillow's and torchvision's whole decodes and a float64 filter."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.jpeg.decoder import JpegDecoder
from tests.pipelines.jpeg.jpeg_files import encode, kinds, photo, pillow, triangle
from tests.pipelines.stored_sets import real

KINDS = list(kinds(16, 16))
SHIFTS = [(0, 0, 0, 0), (0.5, 0, 0, 0), (-0.5, 0, 0, 0), (0, 0.5, 0, 0), (0, -0.5, 0, 0)]


def crops(decoder: JpegDecoder, images: Any, boxes: Any, size: int, **options: Any) -> np.ndarray:
    """[V, N, size, size, 3]"""
    boxes = np.ascontiguousarray(boxes, np.int64)
    out = np.full((len(boxes), len(images), size, size, 3), 77, np.uint8)
    decoder.decode_crops(images, boxes, out, sizes=sizes_of(decoder, images), **options)
    return out


def sizes_of(decoder: JpegDecoder, images: Any) -> np.ndarray:
    sizes = []
    for image in images:
        if isinstance(image, np.ndarray) and image.ndim == 3:
            sizes.append(image.shape[:2])
        else:
            header = decoder.header(image)
            sizes.append((header.height, header.width))
    return np.array(sizes, np.int64)


def random_boxes(count: int, height: int, width: int, *, outside: int = 0, seed: int = 0) -> np.ndarray:
    """[count, 4], of all sizes from one pixel."""
    rng = np.random.default_rng(seed)
    corners = [np.sort(rng.integers(-outside, n + outside, (count, 2)), axis=1) for n in (height, width)]
    return np.stack([c[:, 0] for c in corners] + [c[:, 1] - c[:, 0] + 1 for c in corners], axis=1)


def assert_rounded(ours: np.ndarray, exact: np.ndarray) -> None:
    """The nearest integer, but for the rounding of float32 where two are almost as near."""
    assert ours.dtype == np.uint8
    assert np.abs(ours - exact).max() <= 0.5 + 1e-3


# ---- whole images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (17, 300), (96, 64)])
def test_whole_decode_is_that_of_pillow_and_torchvision(decoder: JpegDecoder, kind: str, size: tuple[int, int]) -> None:
    data = kinds(*size)[kind]
    ours = decoder.decode(data)
    assert np.array_equal(ours, pillow(data))
    # torchvision takes rgb for YCbCr, and older ones bring a libjpeg that blurs the chroma of 440 otherwise.
    if kind not in ("rgb", "440"):
        theirs = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        assert np.array_equal(ours, theirs.permute(1, 2, 0).numpy())


def check_photos(decoder: JpegDecoder, paths: list[Any]) -> None:
    for path in paths:
        data = path.read_bytes()
        header = decoder.header(data)
        with Image.open(io.BytesIO(data)) as image:
            assert (header.width, header.height) == image.size, path
            told = image.getexif().get(0x0112, 1)
            assert header.orientation == (told if told in range(1, 9) else 1), path
            assert header.channels == len(image.getbands()), path
            assert np.array_equal(decoder.decode(data), np.asarray(image.convert("RGB"))), path


def test_real_photos(decoder: JpegDecoder) -> None:
    paths = sorted(real("imagenet-sample").root.rglob("*.JPEG"))
    check_photos(decoder, paths[::10])


@pytest.mark.slow
def test_all_real_photos(decoder: JpegDecoder) -> None:
    check_photos(decoder, sorted(real("imagenet-sample").root.rglob("*.JPEG")))


# ---- regions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("denominator", [1, 2, 4, 8])
def test_a_region_has_the_pixels_of_the_whole(decoder: JpegDecoder, kind: str, denominator: int) -> None:
    """Every place of a box that the filter leaves as it is, on and off the borders of the units of coding."""
    data = kinds(43, 69)[kind]
    whole = pillow(data, denominator)
    size = min(9, *(n // 2 for n in whole.shape[:2]))
    tops, lefts = np.mgrid[: whole.shape[0] - size + 1, : whole.shape[1] - size + 1].reshape(2, -1)
    expected = np.stack([whole[t : t + size, x : x + size] for t, x in zip(tops, lefts, strict=True)])
    side = np.full_like(tops, size * denominator)
    boxes = np.stack([tops * denominator, lefts * denominator, side, side], axis=1)[None]
    got = crops(decoder, [data] * len(tops), boxes, size, scaled=denominator > 1)
    assert np.array_equal(got[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_crops_are_the_float64_filter_on_the_whole_decode(decoder: JpegDecoder, kind: str) -> None:
    data = kinds(67, 85)[kind]
    whole = pillow(data)
    boxes = np.stack([random_boxes(20, *whole.shape[:2], outside=o, seed=o) for o in (0, 30)])
    for size in (1, 23, 32):
        got = crops(decoder, [data] * 20, boxes, size, scaled=False)
        for view, box in np.ndindex(2, 20):
            assert_rounded(got[view, box], triangle(whole, tuple(boxes[view, box]), size))


@pytest.mark.parametrize("size", [96, 224])
def test_crops_of_a_photo(decoder: JpegDecoder, size: int) -> None:
    data = encode(photo(), subsampling="4:2:0")
    boxes = np.concatenate(
        [
            random_boxes(4, 427, 640),
            [[0, 0, 427, 640], [0, 0, size, size], [426, 639, 1, 1], [0, 320, 427, 1]],
            [[-40, -40, 200, 300], [300, 500, 300, 300], [-900, 0, 30, 30], [100, 640, 30, 30], [-50, -9, 999, 999]],
        ]
    )
    whole = pillow(data)
    exact = [triangle(whole, tuple(box), size) for box in boxes]
    for images in ([data] * len(boxes), [whole] * len(boxes)):  # encoded, and raw
        got = crops(decoder, images, boxes[None], size, scaled=False)[0]
        assert_rounded(got, np.stack(exact))
        assert got[-3].max() == got[-2].max() == 0


@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_scaled_crops_are_the_float64_filter_on_the_scaled_decode(decoder: JpegDecoder, denominator: int) -> None:
    data = encode(photo(), subsampling="4:2:0")
    small = pillow(data, denominator)
    rng = np.random.default_rng(denominator)
    size = 320 // denominator - 10
    sides = rng.integers(denominator * size, np.minimum(2 * denominator * size, [427, 640]) + 1, (2, 12, 2))
    boxes = np.concatenate([rng.integers(-20, 40, (2, 12, 2)), sides], axis=2)
    got = crops(decoder, [data] * 12, boxes, size)
    for place in np.ndindex(2, 12):
        assert_rounded(got[place], triangle(small, tuple(boxes[place] / denominator), size))


@pytest.mark.parametrize("denominator", [2, 4, 8])
def test_scaling_hardly_changes_a_crop(decoder: JpegDecoder, denominator: int) -> None:
    """libjpeg's averages have another frequency response, so edges differ; measured on this photo: 1.0 to 1.2 grey
    levels in the mean, 0.07 in the mean with sign. Half a pixel's offset, the likeliest mistake, makes it 1.3 to 2.2
    for denominators 4 and 2, and the nearest crop is no longer the one in the right place."""
    data = encode(photo(), subsampling="4:2:0")
    whole, size, box = pillow(data), 320 // denominator - 10, np.array([10, 20, 400, 560])
    got = crops(decoder, [data], box[None, None], size)[0, 0]
    moved = [np.abs(got - triangle(whole, tuple(box + shift), size)).mean() for shift in SHIFTS]
    assert moved[0] < 1.4
    assert moved[0] == min(moved)
    assert abs((got - triangle(whole, tuple(box), size)).mean()) < 0.1


def test_the_smallest_crop_decides_the_scale(decoder: JpegDecoder) -> None:
    data = encode(photo())
    boxes = np.array([[[0, 0, 400, 400]], [[0, 0, 99, 400]]])
    assert_rounded(crops(decoder, [data], boxes, 50)[0, 0], triangle(pillow(data), (0, 0, 400, 400), 50))
    boxes[1, 0, 2] = 100
    assert_rounded(crops(decoder, [data], boxes, 50)[0, 0], triangle(pillow(data, 2), (0, 0, 200, 200), 50))


def test_a_batch_of_everything(decoder: JpegDecoder) -> None:
    """Kinds, sizes and storage mixed; only the samples asked for are touched."""
    data = kinds(67, 85)
    stored = np.frombuffer(b"xy" + data["420"] + b"z", np.uint8)
    images = [*data.values(), memoryview(data["444"]), bytearray(data["422"]), stored[2:-1], pillow(data["gray"])]
    sizes = sizes_of(decoder, images)
    boxes = np.stack([[random_boxes(1, *size, outside=5, seed=v)[0] for size in sizes] for v in range(3)])
    got = crops(decoder, images, boxes, 16, scaled=False)
    for view, i in np.ndindex(got.shape[:2]):
        image = images[i]
        whole = image if isinstance(image, np.ndarray) and image.ndim == 3 else pillow(bytes(image))
        assert_rounded(got[view, i], triangle(whole, tuple(boxes[view, i]), 16))
    part = np.full_like(got, 77)
    hidden = [image if 3 <= i < 9 else None for i, image in enumerate(images)]
    decoder.decode_crops(hidden, boxes, part, sizes=sizes.astype(np.int32), scaled=False, begin=3, end=9)
    assert np.array_equal(part[:, 3:9], got[:, 3:9])
    assert (part[:, :3] == 77).all()
    assert (part[:, 9:] == 77).all()


def test_threads_change_nothing(decoder: JpegDecoder) -> None:
    images = [data for size in ((67, 85), (200, 31), (17, 300)) for data in kinds(*size).values()] * 4
    sizes = sizes_of(decoder, images)
    boxes = np.stack([[random_boxes(1, *size, outside=5, seed=v)[0] for size in sizes] for v in range(2)])
    alone = crops(decoder, images, boxes, 40)
    shared = np.zeros_like(alone)

    def work(begin: int) -> None:
        decoder.decode_crops(images, boxes, shared, sizes=sizes, begin=begin, end=min(begin + 3, len(images)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(0, len(images), 3)))
    assert np.array_equal(shared, alone)


# ---- arguments -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": np.empty((1, 1, 8, 8, 3), np.float32)}, "out: expected .* uint8, got .* float32"),
        ({"out": np.empty((1, 1, 8, 9, 3), np.uint8)}, "out: expected"),
        ({"out": np.empty((1, 1, 8, 16, 3), np.uint8)[:, :, :, ::2]}, "contiguous"),
        ({"out": np.empty((1, 2, 8, 8, 3), np.uint8)}, "1 images"),
        ({"boxes": np.array([[[0, 0, 8, 8]]], np.int32)}, "boxes: expected .* int64, got .* int32"),
        ({"boxes": np.array([[0, 0, 8, 8]])}, "boxes: expected"),
        ({"boxes": np.array([[[0, 0, 0, 8]]])}, "from 1"),
        ({"boxes": np.array([[[0, 0, 8, -8]]])}, "from 1"),
        ({"boxes": np.array([[[0, -(2**40), 8, 8]]])}, "nothing beyond"),
        ({"boxes": np.array([[[0, -(2**63), 8, 8]]])}, "nothing beyond"),
        ({"sizes": np.array([[20.0, 20.0]])}, "sizes"),
        ({"sizes": np.array([20, 20])}, "sizes"),
        ({"begin": 1, "end": 0}, "begin and end"),
        ({"end": 2}, "begin and end"),
        ({"images": ["photo.jpg"]}, "image 0: expected bytes or a uint8 array, got str"),
        ({"images": [np.zeros((20, 20, 4), np.uint8)]}, "image 0: expected uint8 .*4"),
        ({"images": [np.zeros(20, np.int8)]}, "image 0: expected a JPEG"),
        ({"images": [np.zeros((20, 21, 3), np.uint8)]}, "image 0: it has 20 x 21 pixels, expected 20 x 20"),
    ],
)
def test_refusals(decoder: JpegDecoder, changes: dict[str, Any], message: str) -> None:
    given = {
        "images": [photo()[:20, :20]],
        "boxes": np.array([[[0, 0, 8, 8]]]),
        "out": np.empty((1, 1, 8, 8, 3), np.uint8),
        "sizes": np.array([[20, 20]]),
    }
    decoder.decode_crops(**given)
    with pytest.raises(ValueError, match=message):
        decoder.decode_crops(**(given | changes))
