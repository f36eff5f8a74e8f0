"""Image files of every mode, and what is said of those that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.sources import DataError, decode
from pipelines.stored.images import stored_size
from tests.pipelines.stored_sets import noise, save, write_image


def test_decoding_of_every_mode(tmp_path: Path) -> None:
    gray = noise(6, 9)
    expected = np.repeat(gray[..., None], 3, axis=2)
    picture = Image.fromarray(gray)
    assert np.array_equal(decode(save(picture, tmp_path / "gray.png")), expected)
    wide = Image.fromarray(gray.astype(np.uint16) * 257)
    assert np.array_equal(decode(save(wide, tmp_path / "sixteen.png")), expected)
    assert np.array_equal(decode(save(wide, tmp_path / "sixteen.tiff")), expected)
    assert np.array_equal(decode(save(picture.convert("P"), tmp_path / "palette.png")), expected)
    bits = decode(save(picture.convert("1"), tmp_path / "one.png"))
    assert set(np.unique(bits)) <= {0, 255}

    # CMYK: no ink is white, all black ink is black, full cyan takes the red away.
    inks = np.zeros((1, 3, 4), np.uint8)
    inks[0, 1, 3] = inks[0, 2, 0] = 255
    cmyk = decode(save(Image.fromarray(inks, mode="CMYK"), tmp_path / "cmyk.tiff"))
    assert cmyk.tolist() == [[[255, 255, 255], [0, 0, 0], [0, 255, 255]]]
    blocks = Image.fromarray(np.repeat(np.repeat(inks, 16, 0), 16, 1), mode="CMYK")
    jpeg = decode(save(blocks, tmp_path / "cmyk.jpg", quality=100))
    assert np.abs(jpeg[8, [8, 24, 40]].astype(int) - cmyk[0]).max() < 12

    # Transparent pixels turn white, half transparent ones half white, opaque ones stay.
    layers = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 128]]], np.uint8)
    clear = decode(save(Image.fromarray(layers), tmp_path / "rgba.png"))
    assert clear[0, :2].tolist() == [[255, 255, 255], [10, 20, 30]]
    assert clear[0, 2].tolist() == pytest.approx([127] * 3, abs=1)
    for name in ("gray.png", "sixteen.png", "palette.png", "cmyk.jpg", "rgba.png"):
        result = decode(tmp_path / name)
        assert (result.dtype, result.ndim, result.flags.writeable) == (np.uint8, 3, True)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (3, lambda a: a[::-1, ::-1]),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(
    orientation: int, turn: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    pixels = noise(6, 9, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(pixels), tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decode(path), turn(pixels))
    assert stored_size(path) == turn(pixels).shape[:2]


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "absent", "float"])
def test_a_broken_file_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a" / ("broken.tif" if kind == "float" else "broken.jpg")
    write_image(path, size=(200, 200))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "float":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(path)
    else:
        path.unlink()
    with pytest.raises(DataError, match=str(path)):
        decode(path)


def test_reduced_decoding_keeps_the_statistics(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:400, 0:600]
    smooth = np.stack([rows / 400, columns / 600, (rows + columns) / 1000], axis=2)
    path = save(Image.fromarray((smooth * 255).astype(np.uint8)), tmp_path / "big.jpg", quality=95)
    small = decode(path, at_least=128)
    assert 128 <= min(small.shape[:2]) < 400
    assert small.mean((0, 1)) / 255 == pytest.approx(smooth.mean((0, 1)), abs=0.01)
