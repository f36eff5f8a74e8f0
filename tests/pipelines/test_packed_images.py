"""What readers see of stored images besides pixels: the stored form, the sizes, the place on the disk."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.stored.images import ArrayImages, DataError, FileImages, decode_bytes
from tests.pipelines.stored_sets import noise, write_image


def test_arrays_are_read_without_a_copy() -> None:
    first, second = noise(4, 5, 6, 3), noise(3, 5, 6, 3, seed=1)
    images = ArrayImages(first, second).select(np.array([6, 0, 4]))
    assert np.array_equal(images.read(0), second[2])
    assert np.shares_memory(images.read(1), first)
    assert not np.shares_memory(images[1], first)
    assert (images.sizes.dtype, images.sizes.tolist()) == (np.int32, [[5, 6]] * 3)
    assert (images.addresses.dtype, images.addresses.tolist()) == (np.int64, [6, 0, 4])
    turned = ArrayImages(first.transpose(0, 2, 1, 3))  # as STL-10 is stored
    assert turned.read(0).flags.c_contiguous
    assert np.array_equal(turned.read(2), first[2].transpose(1, 0, 2))


def test_files_are_read_as_they_are(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    images = FileImages(tmp_path, ["a.png"])
    assert images.read(0) == path.read_bytes()
    assert images.where(0) == f"the image file {path}"
    assert images.sizes is None
    assert images.addresses is None


def test_bytes_are_decoded_like_files() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(6, 9, 3)).save(file, format="PNG", exif=exif)
    expected = np.rot90(noise(6, 9, 3), -1)
    assert np.array_equal(decode_bytes(file.getvalue(), "it"), expected)
    assert np.array_equal(decode_bytes(np.frombuffer(file.getvalue(), np.uint8), "it"), expected)
    with pytest.raises(DataError, match=r"cannot decode sample 7 of x\.tar: not an image that Pillow knows"):
        decode_bytes(b"<html>404</html>", "sample 7 of x.tar")
