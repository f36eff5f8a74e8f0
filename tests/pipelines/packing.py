"""Sets that the tests of packed formats write, and pack in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from pipelines.packed.conversion import SetSource, convert
from pipelines.packed.encode import Options
from pipelines.packed.gathering import gather
from pipelines.packed.manifest import Manifest
from pipelines.sources import DataConfig, DataError, Source, Split, describe, open_source
from tools.convert import app

FORMATS = ("ffcv", "webdataset", "tfrecord")


def pack(config: DataConfig, destination: Path, **options: Any) -> Manifest:
    return convert(gather(config, None)[0], destination, Options(**options), workers=0).manifest


def as_packed(config: DataConfig, destination: Path) -> DataConfig:
    return config.model_copy(update={"root": destination})


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Something smooth with some noise: JPEG keeps it nearly as it is."""
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    channels = np.stack([rows, columns, (rows + columns + seed / 7) % 1], axis=2) * 200
    noise = np.random.default_rng(seed).normal(20, 5, channels.shape)
    return Image.fromarray((channels + noise).clip(0, 255).astype(np.uint8))


def photo_tree(root: Path, classes: dict[str, int], sides: tuple[int, int] | None = None) -> DataConfig:
    """JPEGs in class folders, of different sizes unless `sides` (height, width) are given."""
    seed = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for place in range(count):
            height, width = sides or (30 + 5 * seed, 70 - 3 * seed)
            photo(height, width, seed).save(root / name / f"{place}.jpg", quality=90)
            seed += 1
    return DataConfig(source="folder", root=root, holdout=0.0)


def multi_label(images: Any, labels: np.ndarray) -> SetSource:
    from pipelines.packed.conversion import PartSource

    index = np.arange(len(labels)) * 3 + 1
    part = PartSource("train", images, labels, index, None)
    return SetSource("voc07", tuple(f"class {c}" for c in range(labels.shape[1])), (part,), None)


def run(*arguments: Any) -> Result:
    """`python -m tools.convert` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--workers", 0)])


def splits(config: DataConfig) -> dict[str, Source | None]:
    out: dict[str, Source | None] = {}
    for split in get_args(Split):
        try:
            out[split] = open_source(config, split)
        except DataError:
            out[split] = None
    return out


def assert_alike(config: DataConfig, packed: DataConfig, *, pixels: bool = True) -> None:
    """All splits of both are equal, and what is said of them without opening."""
    assert describe(config) == describe(packed)
    originals = splits(config)
    for split, ours in splits(packed).items():
        original = originals[split]
        if original is None or ours is None:
            assert original is ours
            continue
        assert (ours.labels.dtype, ours.classes) == (original.labels.dtype, original.classes)
        assert torch.equal(ours.labels, original.labels)
        assert torch.equal(ours.ids, original.ids)
        assert (ours.mean, ours.std, ours.image_size) == (original.mean, original.std, original.image_size)
        if pixels:
            for row in range(0, len(ours), 7):
                assert np.array_equal(ours.images[row], original.images[row])
