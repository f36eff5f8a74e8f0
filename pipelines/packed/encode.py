"""One stored image as it goes into a packed set: kept as it is, encoded anew, or as raw pixels; checked either way."""

from __future__ import annotations

import functools
import hashlib
import io
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipelines.stored.encoded import open_image
from pipelines.stored.images import DataError, Images, decode_bytes

Format = Literal["ffcv", "webdataset", "tfrecord"]
Encoding = Literal["kept", "encoded", "raw"]


class BadImage(ValueError):  # noqa: N818 (it is about an image, not an error of the program)
    """An image that cannot be packed; the message is the reason alone."""


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes of a packed set."""

    to: Format = "ffcv"
    max_side: int = 500  # pixels; larger images are reduced; 0: none is
    quality: int = 90  # of the JPEGs that are encoded anew
    write_mode: Literal["jpg", "raw", "proportion"] = "jpg"
    raw_share: float = 0.5  # of the images that proportion stores raw
    jpeg: Literal["keep", "encode"] = "keep"  # keep: JPEGs that need no change are stored byte for byte
    shard_mb: int = 256  # of tar and TFRecord shards
    shuffle: int | None = 0  # seed of the order inside shards; None, and always for ffcv: as in the source

    def settled(self) -> Options:
        """With what has no effect set to its default, so that equal results have equal options."""
        usual, shards, mixed = Options(), self.to != "ffcv", self.write_mode == "proportion"
        lossless = self.write_mode == "raw"
        return replace(
            self,
            quality=usual.quality if lossless else self.quality,
            jpeg=usual.jpeg if lossless else self.jpeg,
            raw_share=self.raw_share if mixed else usual.raw_share,
            shard_mb=self.shard_mb if shards else usual.shard_mb,
            shuffle=self.shuffle if shards else None,
        )

    def raw(self, index: int) -> bool:
        """Whether the image at this position is stored without loss; a rerun decides alike."""
        if self.write_mode != "proportion":
            return self.write_mode == "raw"
        digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.raw_share * 2.0**64


@dataclass(frozen=True, slots=True)
class Encoded:
    """An image ready to be written."""

    data: bytes  # a JPEG or PNG file, or pixels [H, W, 3]
    height: int
    width: int
    encoding: Encoding
    means: np.ndarray  # [3] float64, of the channels in [0, 1]
    squares: np.ndarray  # [3] float64, means of the squared values


@dataclass(frozen=True, slots=True)
class Header:
    """What an encoded image says of itself, and Pillow of it."""

    format: str
    mode: str
    height: int  # as stored
    width: int
    orientation: int  # 1: upright

    @property
    def plain_jpeg(self) -> bool:
        return self.format == "JPEG" and self.mode in ("RGB", "L")


def encode(images: Images, row: int, index: int, options: Options) -> Encoded:
    """Image `row` of `images`, at position `index` of its set.

    Raises:
        BadImage: it cannot be read, is damaged, or is larger than Pillow's limit; says why.
    """
    raw = options.raw(index)
    try:
        stored = images.read(row)
    except DataError as error:
        raise BadImage(_reason(error)) from error
    if isinstance(stored, np.ndarray) and stored.ndim == 3:
        pixels = stored
    else:
        header, pixels = decode_checked(stored)
        keep = options.jpeg == "keep" and not raw and _upright(stored, header)
        if keep and (not options.max_side or max(pixels.shape[:2]) <= options.max_side):
            return _encoded(bytes(stored), pixels, "kept", options)
    pixels = _reduced(pixels, options.max_side)
    if not raw:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=options.quality)
        return _encoded(file.getvalue(), pixels, "encoded", options)
    if options.to == "ffcv":
        return _encoded(pixels.tobytes(), pixels, "raw", options)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=3)  # 6 takes thrice the time for 2 % less
    return _encoded(file.getvalue(), pixels, "raw", options)


def decode_checked(data: bytes | np.ndarray) -> tuple[Header, np.ndarray]:
    """(header, upright pixels [H, W, 3] uint8) of an encoded image, without mercy for what decoders put up with.

    Where our JPEG decoder can be built it is used: for it corrupt data is an error, where Pillow shows gray.

    Raises:
        BadImage: says why.
    """
    if not len(data):
        raise BadImage("the file is empty")
    header = read_header(data)
    decoder = _jpeg_decoder() if header.plain_jpeg else None
    try:
        pixels = decoder.decode(data) if decoder is not None and decoder.header(data).supported else None
        if pixels is None or header.orientation != 1:
            pixels = decode_bytes(data, "it")
    except ValueError as error:  # JpegError and DataError are
        raise BadImage(_reason(error)) from error
    return header, pixels


def read_header(data: bytes | np.ndarray) -> Header:
    try:
        with open_image(io.BytesIO(bytes(data))) as image:
            width, height = image.size
            # Looking for EXIF behind the pixels would decode a PNG whole.
            told = image.format != "PNG" or not {"exif", "Raw profile type exif"}.isdisjoint(image.info)
            turn = int(image.getexif().get(0x0112) or 1) if told else 1
            return Header(str(image.format), image.mode, height, width, turn if turn in range(1, 9) else 1)
    except Exception as error:  # Pillow's plugins raise whatever comes
        raise BadImage(_reason(error)) from error


def _upright(data: bytes | np.ndarray, header: Header) -> bool:
    """Whether every JPEG decoder shows `data` alike: RGB or gray, upright, baseline or progressive."""
    if not header.plain_jpeg or header.orientation != 1:
        return False
    at, stored = 2, bytes(data[: 1 << 20])  # frames start behind the metadata, of less than 64 kB a segment
    while at + 4 <= len(stored) and stored[at] == 0xFF:
        marker = stored[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker in (0xC0, 0xC1, 0xC2)
        else:
            at += 2 + int.from_bytes(stored[at + 2 : at + 4], "big")
    return False


def _reduced(pixels: np.ndarray, max_side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    if not max_side or max(height, width) <= max_side:
        return pixels
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _encoded(data: bytes, pixels: np.ndarray, encoding: Encoding, options: Options) -> Encoded:
    height, width = pixels.shape[:2]
    if options.to == "ffcv" and max(height, width) > 65_535:
        raise BadImage(f"{height:,} x {width:,} pixels; a .beton has 16 bits for a side: give a smaller --max-side")
    step = 4 if min(height, width) >= 128 else 1
    sample = pixels[::step, ::step].reshape(-1, 3) / 255.0
    return Encoded(data, height, width, encoding, sample.mean(0), (sample * sample).mean(0))


@functools.cache
def _jpeg_decoder() -> Any | None:
    try:
        from pipelines.jpeg.decoder import jpeg_decoder
    except ImportError:
        return None
    return jpeg_decoder()


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, DataError) else error
    if isinstance(cause, UnidentifiedImageError):
        return "not an image that Pillow knows"
    return getattr(cause, "reason", None) or str(cause or error) or type(error).__name__
