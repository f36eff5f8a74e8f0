"""What every reader gives, what is known of a set beforehand, and what is measured where no paper says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from pipelines.stored.images import DataError, FileImages, Images, decode

if TYPE_CHECKING:
    from pathlib import Path

    from pipelines.sources import DataConfig

Part = Literal["train", "train+unlabelled", "test"]
RGB = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Stored:
    """One part of a set, whole and in stored order."""

    images: Images
    labels: Tensor  # [N] int64, -1 unknown; or [N, C] float32, 1 present, 0 absent, -1 ignored
    classes: tuple[str, ...]
    ids: Tensor | None = None  # [N] int64 stored position, where that is not 0, 1, 2, ...
    # (path, reason) of files that lie among the images and were not taken for such.
    left_out: Callable[[], list[tuple[str, str]]] | None = None


@dataclass(frozen=True, slots=True)
class Fixed:
    """How many images and classes a set has whose files never change."""

    train: int
    test: int
    classes: int
    unlabelled: int = 0


@dataclass(frozen=True, slots=True)
class StoredSet:
    """What is known of a set before it is opened."""

    read: Callable[[DataConfig, Part], Stored]
    image_size: int | None = None  # the side its field trains at; None: measured on the training images
    statistics: tuple[RGB, RGB] | None = None  # mean and standard deviation in [0, 1]; None: measured
    fixed: Fixed | None = None  # None: counted on the disk
    held_out: int | None = None  # how many training images are held out unless data.holdout says otherwise


_STATISTICS: dict[bytes, tuple[RGB, RGB]] = {}


def measured_statistics(images: Images) -> tuple[RGB, RGB]:
    """Mean and standard deviation a channel, in [0, 1]: of all images in memory, or of 500 files.

    Rather than ImageNet's: a folder is often nothing like it (microscopy, satellites, drawings), and 500
    images, drawn with a fixed seed, pin a channel's mean to about 0.01. Photographs are decoded at a fraction
    of their size where JPEG allows it, which is nearer to what a network sees of them.
    """
    if not isinstance(images, FileImages):
        return pixel_statistics(images[row] for row in range(len(images)))
    key = images.key()
    if key not in _STATISTICS:
        rows = np.sort(np.random.RandomState(0).permutation(len(images))[:500])
        _STATISTICS[key] = pixel_statistics(decode(images.path(row), at_least=128) for row in rows.tolist())
    return _STATISTICS[key]


def pixel_statistics(images: Iterable[np.ndarray]) -> tuple[RGB, RGB]:
    """Mean and standard deviation a channel, in [0, 1], over the pixels of uint8 [H, W, 3] arrays.

    Every image counts alike, whatever its size. A channel without variation gets the deviation of one grey
    level, so that dividing by it is harmless.
    """
    shares = np.zeros((3, 256))  # of the grey levels
    for image in images:
        pixels = image.reshape(-1, 3)
        shares += [np.bincount(pixels[:, channel], minlength=256) / len(pixels) for channel in range(3)]
    if not shares.any():
        raise DataError("cannot measure the statistics of no images; set data.root to a folder with images")
    shares /= shares.sum(axis=1, keepdims=True)
    levels = np.arange(256) / 255
    mean = shares @ levels
    std = np.sqrt(np.maximum((shares * (levels - mean[:, None]) ** 2).sum(axis=1), levels[1] ** 2))
    return _rgb(mean), _rgb(std)


def _rgb(values: np.ndarray) -> RGB:
    return float(values[0]), float(values[1]), float(values[2])


def missing(name: str, folder: Path, layout: str, how: str) -> DataError:
    return DataError(
        f"{name}: not found in {folder.absolute()}; expected there: {layout}. To get it: {how}. "
        "The folder is data.root, or the environment variable TWINSTREAM_DATA, or ./data"
    )


def download_or(page: str) -> str:
    return f"set data.download=true, or unpack {page}"


def through_torchvision(config: DataConfig, build: Callable[[], Any], name: str, layout: str, page: str) -> Any:
    """torchvision's data set; its errors become ours."""
    try:
        return build()
    except Exception as error:  # of whatever kind its readers raise
        if config.download:
            raise DataError(
                f"{name}: downloading to {config.folder.absolute()} failed: {error}; check the network, "
                f"remove what is incomplete there, or bring the files by hand: {page}"
            ) from error
        reason = " (present, but incomplete or altered)" if (config.folder / layout.split("/")[0]).is_dir() else ""
        raise missing(name, config.folder, layout + reason, download_or(page)) from error
