"""Small stored sets that the tests of the sources write for themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.sources import DataConfig, Source

REAL = Path(os.environ.get("TWINSTREAM_DATA", "data"))


def real(name: str) -> DataConfig:
    if not (REAL / name).is_dir():
        pytest.skip(f"no real images at {REAL / name} (set TWINSTREAM_DATA)")
    return DataConfig(source="folder", root=REAL / name)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_image(path: Path, size: tuple[int, int] = (10, 8), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(size[1], size[0], 3, seed=seed)).save(path)
    return path


def write_tree(root: Path, counts: dict[str, int], suffix: str = ".png") -> None:
    for name, count in counts.items():
        for index in range(count):
            write_image(root / name / f"{index:03d}{suffix}", seed=index)


def as_list(source: Source) -> list[int]:
    return source.ids.tolist()


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path
