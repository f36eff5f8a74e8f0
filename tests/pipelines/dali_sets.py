"""Sets of small images for the tests of the DALI loader, and the loader itself with a test's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.config import LoaderConfig
from pipelines.dali import DaliLoader
from pipelines.packed.files import find_file
from pipelines.packed.images import PackedImages
from pipelines.packed.table import Table
from pipelines.packed.tar import dali_index as tar_index
from pipelines.packed.tar import pack_sample
from pipelines.packed.tfrecord import dali_index as record_index
from pipelines.packed.tfrecord import pack_record
from pipelines.sources import DataConfig, Source, open_source
from pipelines.views import View, ViewsConfig
from tests.pipelines.stored_sets import write_tree

WHOLE = (View(crop="whole"),)
TWO = ViewsConfig(plan="simclr", override={"jitter": 0, "grayscale": 0, "blur": 0, "flip": 0}).resolve()


def dali_loader(source: Source, plan: tuple[View, ...] = TWO, **settings: Any) -> DaliLoader:
    own = {name: settings.pop(name) for name in list(settings) if name in LoaderConfig.model_fields}
    config = LoaderConfig(loader="dali", **({"workers": 2} | own))
    rest = {"size": 16, "batch_size": 12, "seed": 5, "device": torch.device("cpu"), "config": config} | settings
    return DaliLoader(source, plan, **rest)


def small_set(root: Path) -> Source:
    """41 small JPEGs in two classes: a number that no number of ranks divides."""
    write_tree(root, {"a": 20, "b": 21}, suffix=".jpg")
    return open_folder(root)


def open_folder(root: Path) -> Source:
    return open_source(DataConfig(source="folder", root=root, holdout=0), "pretrain")


def packed(source: Source, kind: str, folder: Path) -> PackedImages:
    """Two shards with the images in another order."""
    suffix, pack, index = (
        ("tar", pack_sample, tar_index) if kind == "webdataset" else ("tfrecord", pack_record, record_index)
    )
    rows, files = {}, []
    order = np.random.default_rng(1).permutation(len(source))
    for shard, part in enumerate(np.array_split(order, 2)):
        path, data, lines = folder / f"train-{shard:05d}.{suffix}", b"", []
        for number in part.tolist():
            image = source.images.read(number)
            height, width = source.images[number].shape[:2]
            detail: Any = "jpg" if suffix == "tar" else (height, width)
            piece, place, line = pack(number, source.labels[number].numpy(), image, detail, len(data))
            rows[number] = (number, 0, height, width, shard, place, len(image), False)
            data, lines = data + piece, [*lines, line]
        path.write_bytes(data + bytes(1024 if suffix == "tar" else 0))
        path.with_suffix(".idx").write_text(index(lines))
        files.append(find_file(path))
    columns = zip(*(rows[number] for number in sorted(rows)), strict=True)
    return PackedImages(tuple(files), Table(*(np.array(column) for column in columns)), kind)


def cut_off(path: Path) -> None:
    """Half of the pixels: the header stays whole."""
    data = path.read_bytes()
    start = data.index(b"\xff\xda")
    path.write_bytes(data[: start + (len(data) - start) // 2])


def indices_of(loader: DaliLoader, epoch: int, first_step: int = 0) -> list[list[int]]:
    return [torch.cat([m.indices for m in step]).tolist() for step in loader.epoch(epoch, first_step)]
