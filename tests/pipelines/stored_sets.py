"""Small stored sets that the tests of the sources write for themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

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


def write_photos(root: Path, count: int) -> None:
    """Parts of two real photographs, JPEGs of all sizes in two classes; the 8th is gray, the 12th lies on its side, and
    the 21st is a PNG that says it is a JPEG."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    for number in range(count):
        height, width = rng.integers(40, 300, 2).tolist()
        top, left = rng.integers(0, 100, 2).tolist()
        photo = photos[number % 2].crop((left, top, left + width, top + height))
        path = root / f"class{number % 2}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        if number == 11:
            exif[0x0112] = 6
        if number == 7:
            photo = photo.convert("L")
        photo.save(path, format="PNG" if number == 20 else "JPEG", quality=90, exif=exif)


def as_list(source: Source) -> list[int]:
    return source.ids.tolist()


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path
