"""Encoded images of strangers: which kinds are opened, how large they may be, what may be done to decode them."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from PIL import Image, ImageFile

from pipelines.foreign import check_regular

# Pillow knows fifty more, which go by the content and not by the name: for some it starts other programs.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
MOST_PIXELS = 89_478_485  # of one image, in every loader: Pillow's own bound, 268 MB as RGB. A header may promise more
MOST_BYTES = 1 << 30  # of an encoded image: four times as many as its pixels may take
MOST_SCANS = 500  # of a progressive JPEG; usual ones have ten, and each costs a pass over the whole image
MOST_WORK = 2_000_000_000  # scans times pixels: a few seconds
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # we refuse where Pillow warns
_START_OF_SCAN = b"\xff\xda"  # cannot occur among a JPEG's pixels: a 0xFF there is followed by 0 or a restart's number


@contextlib.contextmanager
def open_image(file: Path | IO[bytes]) -> Iterator[Image.Image]:
    """Pillow's image of a file or buffer, its header read.

    Raises:
        OSError: it is no regular file, cannot be read, or is not an image of FORMATS.
        ValueError: its header promises more than MOST_PIXELS.
    """
    if isinstance(file, Path):
        check_size(file)
    try:
        opened = Image.open(file, formats=FORMATS)
    except Image.DecompressionBombError as error:  # beyond twice its bound
        raise ValueError(f"more than {MOST_PIXELS:,} pixels; make it smaller beforehand") from error
    with opened as image:
        if image.height * image.width > MOST_PIXELS:
            told = f"{image.height:,} x {image.width:,}"
            raise ValueError(f"{told} are more than {MOST_PIXELS:,} pixels; make it smaller beforehand")
        yield image


def check_size(path: Path) -> os.stat_result:
    """What the system knows of a file; raise OSError if it is not a regular one, or has more than MOST_BYTES."""
    check_regular(path)
    facts = os.stat(path)
    if facts.st_size > MOST_BYTES:
        raise OSError(f"it has {facts.st_size:,} bytes, more than {MOST_BYTES:,}")
    return facts


def check_scans(image: Image.Image, data: bytes | None = None) -> None:
    """Raise ValueError for a JPEG of so many scans that decoding would not end in a sensible time.

    Pillow's and torchvision's decoders have no bound of their own. `data`: the file, where it is in memory.
    """
    if image.format not in ("JPEG", "MPO"):
        return
    scans = _scans(image) if data is None else data.count(_START_OF_SCAN)
    if scans > MOST_SCANS or scans * image.height * image.width > MOST_WORK:
        raise ValueError(f"too many scans: {scans:,} of {image.height:,} x {image.width:,} pixels")


def _scans(image: Image.Image) -> int:
    """How many there are in the file that the image was opened from, at most (a thumbnail has some of its own)."""
    assert isinstance(image, ImageFile.ImageFile)
    file = image.fp
    assert file is not None
    place = file.tell()
    file.seek(0)
    scans, last = 0, b""
    while block := file.read(1 << 20):
        scans += (last + block).count(_START_OF_SCAN)
        last = block[-1:]
    file.seek(place, os.SEEK_SET)
    return scans
