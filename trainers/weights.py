"""Tensors and facts out of files that somebody else may have written: safetensors and JSON, in which nothing runs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.foreign import check_regular

MOST_SIDE = 16_384  # pixels of an encoder's images
MOST_RANKS = 1_000_000
Triple = tuple[float, float, float]

_MASK = os.umask(0o077)  # can only be read by setting it: once, while there is one thread
os.umask(_MASK)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: it cannot be read, or is no safetensors file, such as a pickle of another name.
    """
    return _read(path, lambda: load_file(path))


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any other: the library would make it private."""
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    path.chmod(0o666 & ~_MASK)


def load_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says besides its tensors.

    Raises:
        ValueError: as ``load_tensors``.
    """

    def read() -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}

    return _read(path, read)


def _read(path: Path, action: Any) -> Any:
    try:
        check_regular(path)
        return action()
    except Exception as error:  # SafetensorError, OSError, KeyError and MemoryError, by what is wrong
        raise ValueError(f"{path} cannot be read as safetensors: {error or type(error).__name__}") from error


def check_state(values: Any) -> dict[str, Any]:
    """A checkpoint's ``state.json``, of which names of files and numbers of ranks are made.

    Raises:
        ValueError: it is not what ``save_checkpoint`` writes.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}")
    for key, least, most in (("format", 0, 2**31), ("step", 0, 2**62), ("world_size", 1, MOST_RANKS)):
        if type(values.get(key)) is not int or not least <= values[key] <= most:
            raise ValueError(f"{key} is not a number from {least} to {most:,}")
    names = values.get("sharded")
    if not isinstance(names, list) or not all(isinstance(n, str) and re.fullmatch(r"\w{1,64}", n) for n in names):
        raise ValueError("sharded is not a list of names")
    return values


def image_facts(about: Any) -> tuple[int, Triple, Triple]:
    """(side in pixels, mean, standard deviation) of an encoder's images, from its description.

    Raises:
        ValueError, TypeError, KeyError: they are not there, or such that no image could be fed.
    """
    size = about["image_size"]
    if type(size) is not int or not 1 <= size <= MOST_SIDE:
        raise ValueError(f"image_size is {str(size)[:40]}, expected 1 to {MOST_SIDE:,}")
    mean, std = (tuple(float(value) for value in about[name]) for name in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std have {len(mean)} and {len(std)} values, expected three")
    if not all(abs(value) <= 1e3 for value in mean) or not all(1e-6 <= value <= 1e3 for value in std):
        raise ValueError(f"mean {mean} and std {std} are not those of images")
    return size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
