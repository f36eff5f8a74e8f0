"""Images as they are stored: uint8 arrays in memory, or files that are decoded on demand.

Whatever the storage, an image comes out as uint8 [H, W, 3] in RGB, upright. What cannot be read is a
`DataError` that names the file.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.foreign import printable
from pipelines.jpeg.decoder import JpegError, jpeg_decoder
from pipelines.stored.encoded import MOST_PIXELS, check_scans, check_size, open_image

_HEADER_BYTES = 16384  # in which a JPEG's sizes usually stand

# As torchvision.datasets.folder.IMG_EXTENSIONS; compared without regard to case.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class DataError(ValueError):
    """Stored data is missing, broken or does not fit what was asked of it; one line, whatever files are called."""

    def __str__(self) -> str:
        return printable(super().__str__())


class Images(Protocol):
    """N stored images, decoded one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Image `index` as a fresh uint8 [H, W, 3] array."""
        ...

    @property
    def array(self) -> np.ndarray | None:
        """All images as one uint8 array [N, H, W, 3], or None where they are not one array in memory."""
        ...

    @property
    def size(self) -> tuple[int, int] | None:
        """The (height, width) that all images share, so that they can be stacked; None where they differ."""
        ...

    def select(self, positions: np.ndarray, /) -> Images:
        """The images at `positions` (int64), in that order."""
        ...

    def feed(self, digest: Any, /, *, times: bool = True) -> None:
        """Update a hashlib object with pixels, or with the files' names, sizes and (`times`) dates."""
        ...

    def read(self, index: int, /) -> bytes | np.ndarray:
        """Image `index` as it is stored, for decoders that are not ours.

        An encoded file comes as bytes, or as a 1-D uint8 array that looks into a memory map without a copy;
        raw pixels come as C-contiguous uint8 [H, W, 3]. Arrays may be read-only: do not write to them.
        """
        ...

    def where(self, index: int, /) -> str:
        """What to call image `index` in an error: "the image file …"."""
        ...

    @property
    def sizes(self) -> np.ndarray | None:
        """int32 [N, 2], (height, width) of the upright images; None where only reading them would tell."""
        ...

    @property
    def addresses(self) -> np.ndarray | None:
        """int64 [N], numbers that grow with the place on the disk, to read in nearly that order; None: not known."""
        ...


_COPIED = 1024  # images at a time


class ArrayImages:
    """Images in one or several uint8 arrays [n, H, W, 3] (a memory map will do), seen as one sequence.

    Args:
        parts: the arrays, all of one height and width; they are never copied.
        positions: int64 [N], which rows of the joined parts to show; None for all.
    """

    def __init__(self, *parts: np.ndarray, positions: np.ndarray | None = None) -> None:
        for part in parts:
            if part.dtype != np.uint8 or part.ndim != 4 or part.shape[1:] != (*parts[0].shape[1:3], 3):
                raise DataError(f"expected uint8 arrays [N, H, W, 3] of one size, got {part.dtype} {part.shape}")
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self._positions = positions

    def __len__(self) -> int:
        return int(self._starts[-1]) if self._positions is None else len(self._positions)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array(self._view(index), order="C")

    def read(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self._view(index))

    def where(self, index: int) -> str:
        return f"image {index} of {len(self):,} in memory"

    def _view(self, index: int) -> np.ndarray:
        index = range(len(self))[index]  # IndexError beyond the end; negative indices as usual
        row = index if self._positions is None else int(self._positions[index])
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._parts[part][row - self._starts[part]]

    @property
    def array(self) -> np.ndarray:
        """All images as uint8 [N, H, W, 3]: the stored array itself where possible, else a new copy."""
        if self._positions is None and len(self._parts) == 1:
            return self._parts[0]
        rows = np.arange(len(self)) if self._positions is None else self._positions
        joined = np.empty((len(rows), *self._parts[0].shape[1:]), dtype=np.uint8)
        for part, start in zip(self._parts, self._starts, strict=False):
            inside = np.flatnonzero((rows >= start) & (rows < start + len(part)))
            for some in np.array_split(inside, -(-len(inside) // _COPIED) or 1):  # indexing makes a copy of its own
                joined[some] = part[rows[some] - start]
        return joined

    @property
    def size(self) -> tuple[int, int]:
        height, width = self._parts[0].shape[1:3]
        return int(height), int(width)

    @property
    def sizes(self) -> np.ndarray:
        return np.broadcast_to(np.array(self.size, dtype=np.int32), (len(self), 2))

    @property
    def addresses(self) -> np.ndarray:
        rows = np.arange(len(self)) if self._positions is None else self._positions
        return rows.astype(np.int64, copy=False)

    def select(self, positions: np.ndarray) -> ArrayImages:
        rows = positions if self._positions is None else self._positions[positions]
        return ArrayImages(*self._parts, positions=rows)

    def feed(self, digest: Any, *, times: bool = True) -> None:
        digest.update(f"array {len(self)} {self.size}".encode())
        for start in range(0, len(self), 1024):  # in blocks: a memory map need never be whole in memory
            block = self.select(np.arange(start, min(start + 1024, len(self))))
            digest.update(np.ascontiguousarray(block.array))


_SIZES: dict[bytes, tuple[int, int] | None] = {}  # by FileImages.key()


class FileImages:
    """Image files under one folder, decoded when asked for.

    Args:
        root: the folder.
        names: paths below `root`, in order. They are kept as one array of bytes: a million Python strings
            would be copied into every worker process, page by page, as soon as their reference counts are
            touched.
    """

    def __init__(self, root: Path, names: Sequence[str] | np.ndarray) -> None:
        self.root = root
        self.names = names if isinstance(names, np.ndarray) else np.array([os.fsencode(n) for n in names], dtype="S")
        self._size: tuple[int, int] | None = None  # known to be shared
        self._seen: np.ndarray | None = None  # [N, 2] int64, size and date when first read; zeros: not read yet

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> np.ndarray:
        return decode(self.path(index))

    def where(self, index: int) -> str:
        return f"the image file {self.path(index)}"

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.names[index]))

    def read(self, index: int) -> bytes:
        try:
            self._check_same(index, check_size(self.path(index)))
            return self.path(index).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the image file {self.path(index)}: {error}") from error

    def _check_same(self, index: int, facts: os.stat_result) -> None:
        """Refuse a file that was changed since this process first read it: boxes are drawn for the one before."""
        if self._seen is None:
            self._seen = np.zeros((len(self), 2), np.int64)
        now = facts.st_size, facts.st_mtime_ns
        before = tuple(self._seen[index].tolist())
        if any(before) and before != now:
            raise DataError(
                f"the image file {self.path(index)} was changed during the run ({before[0]:,} bytes before, now"
                f" {now[0]:,}); put the old one back and run the same command again"
            )
        self._seen[index] = now

    @property
    def array(self) -> None:
        return None

    @property
    def sizes(self) -> None:
        return None

    @property
    def addresses(self) -> None:
        return None

    @property
    def size(self) -> tuple[int, int] | None:
        """As in `Images`. Reads headers, up to the first that differs; kept while the files stay the same."""
        if self._size is None and len(self):
            key = self.key()
            if key not in _SIZES:
                first = stored_size(self.path(0))
                same = all(stored_size(self.path(index)) == first for index in range(1, len(self)))
                _SIZES[key] = first if same else None
            self._size = _SIZES[key]
        return self._size

    def select(self, positions: np.ndarray) -> FileImages:
        chosen = FileImages(self.root, self.names[positions])
        chosen._size = self._size  # a part of images of one size is of that size too
        return chosen

    def key(self) -> bytes:
        """Hash of the files' names, sizes and dates."""
        digest = hashlib.blake2b(digest_size=16)
        self.feed(digest)
        return digest.digest()

    def feed(self, digest: Any, *, times: bool = True) -> None:
        digest.update(f"files {len(self)}".encode())
        folder = os.fsencode(self.root)
        for name in self.names.tolist():
            try:
                facts = os.stat(os.path.join(folder, name))
            except OSError as error:
                raise DataError(f"cannot read an image file: {error}; restore it, or open the set again") from error
            digest.update(name + f"|{facts.st_size}".encode())
            if times:
                digest.update(f"|{facts.st_mtime_ns}".encode())


def decode(path: Path, *, at_least: int | None = None) -> np.ndarray:
    """One image file as uint8 [H, W, 3], RGB, turned upright by its EXIF orientation.

    Gray is repeated over the channels, 16-bit gray is scaled to 8 bits, palettes and CMYK are converted, and
    what is transparent is laid on white: the colours stored under transparent pixels are arbitrary.

    Args:
        path: the file.
        at_least: let JPEG's decoder return a smaller image, neither side shorter than this, in less time.

    Raises:
        DataError: the file is missing, truncated or not an image that can be shown in RGB; names the path.
    """
    return _decode(path, f"the image file {path}", at_least)


def decode_bytes(data: bytes | np.ndarray, name: str, *, at_least: int | None = None) -> np.ndarray:
    """As `decode`, of an encoded image in memory (bytes or a 1-D uint8 array); errors call it `name`."""
    return _decode(io.BytesIO(bytes(data)), name, at_least)


def _decode(file: Path | io.BytesIO, name: str, at_least: int | None) -> np.ndarray:
    try:
        with open_image(file) as image:
            check_scans(image)
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            return np.array(_as_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise _unreadable(name, error) from error


def stored_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file once upright, from its header alone.

    Raises:
        DataError: as `decode`, as far as a header can tell.
    """
    try:
        if (of_jpeg := _jpeg_size(path)) is not None:
            return of_jpeg
        with open_image(path) as image:
            width, height = image.size
            # Looking for EXIF behind the pixels would decode a PNG whole.
            told = image.format != "PNG" or not {"exif", "Raw profile type exif"}.isdisjoint(image.info)
            # 5 to 8 are the orientations that lie on their side.
            turned = told and image.getexif().get(0x0112) in (5, 6, 7, 8)
    except Exception as error:
        raise _unreadable(f"the image file {path}", error) from error
    return (width, height) if turned else (height, width)


def _jpeg_size(path: Path) -> tuple[int, int] | None:
    """`stored_size` of a JPEG by our own decoder, in a tenth of Pillow's time; None where Pillow is to say it."""
    if (decoder := jpeg_decoder()) is None:
        return None
    check_size(path)
    with open(path, "rb", buffering=0) as file:
        start = file.read(_HEADER_BYTES)
    try:
        header = decoder.header(start)
    except JpegError:  # perhaps a PNG, or EXIF with a large thumbnail stands before
        return None
    if not header.supported or header.height * header.width > MOST_PIXELS:
        return None
    return (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)


def upright_jpeg(data: bytes | np.ndarray) -> tuple[int, int] | None:
    """(height, width) of a gray or RGB JPEG that needs no turning, by its header: what any decoder decodes alike."""
    try:
        encoded = bytes(data)
        with open_image(io.BytesIO(encoded)) as image:
            check_scans(image, encoded)
            if image.format != "JPEG" or image.mode not in ("L", "RGB") or image.getexif().get(0x0112, 1) != 1:
                return None
            return image.height, image.width
    except Exception:  # whatever Pillow's parsers raise: decoding it will tell
        return None


def _as_rgb(image: Image.Image) -> Image.Image:
    # "I;16" and its byte orders, and "I" where a version of Pillow widens 16-bit PNG.
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError(f"integer pixels from {values.min()} to {values.max()}, expected 0 to 65535")
        return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; store 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _unreadable(name: str, error: Exception) -> DataError:
    # Pillow's "cannot identify" names a buffer by its address, which says nothing.
    reason = "not an image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
    return DataError(
        f"cannot decode {name}: {reason or type(error).__name__}; replace the file or take it out of the set"
    )
