"""The stored parts of a source, as `conversion.convert` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pipelines.packed.conversion import PartSource, SetSource
from pipelines.packed.manifest import Statistics
from pipelines.packed.opening import PackedSet, find_packed
from pipelines.sources import SETS, DataConfig, read_part, side_of
from pipelines.stored.common import Stored, measured_statistics
from pipelines.stored.images import DataError

Name = Literal["train", "test"]


def gather(config: DataConfig, wanted: Sequence[Name] | None) -> tuple[SetSource, list[str]]:
    """(what is to be packed, remarks); `wanted` None: the training part, and the test part where there is one.

    Raises:
        DataError: a part that is wanted is not there.
    """
    known, packed = SETS[config.source], find_packed(config)
    unlabelled = known.fixed is not None and known.fixed.unlabelled > 0
    parts, remarks = [], []
    classes: tuple[str, ...] = ()
    stored: dict[str, Stored] = {}
    for name in wanted or ("train", "test"):
        try:
            part = read_part(config, "train+unlabelled" if name == "train" and unlabelled else name, packed)
        except DataError as error:
            if wanted is not None or name == "train":
                raise
            remarks.append(f"without test images: {error}")
            continue
        stored[name] = part
        classes = part.classes
        parts.append(_part(config, name, part, packed))
    statistics = None if packed is None else packed.manifest.statistics
    measure = known.statistics is None or known.image_size is None
    if measure and statistics is None:
        train = stored["train"] if "train" in stored else read_part(config, "train", packed)
        try:
            mean, std = known.statistics or measured_statistics(train.images)
            side = known.image_size or side_of(train.images)
            statistics = Statistics(mean=mean, std=std, image_size=side)
        except DataError as error:
            remarks.append(f"mean and deviation will be measured on the converted images: {error}")
    # A named set may lie in a folder of many, as ./data; where its images lie is known by then.
    folder = config.folder if config.url is None and (config.source == "folder" or packed is not None) else None
    chosen = config.class_list is not None
    return SetSource(config.source, classes, tuple(parts), statistics, measure, chosen, folder), remarks


def _part(config: DataConfig, name: Name, stored: Stored, packed: PackedSet | None) -> PartSource:
    labels = stored.labels.numpy()
    index = np.arange(len(labels)) if stored.ids is None else stored.ids.numpy()
    if not len(labels) or (np.diff(index) <= 0).any():
        raise DataError(f"{config.source}: the {name} images are not listed in ascending order of their positions")
    counts = None
    if labels.ndim == 1 and stored.classes:
        counts = tuple(np.bincount(labels[labels >= 0], minlength=len(stored.classes)).tolist())
        if packed is not None and packed.manifest.classes == stored.classes:
            counts = packed.manifest.parts[name].class_counts  # with those that an earlier conversion left out
    left_out = () if stored.left_out is None else tuple(stored.left_out())
    return PartSource(name, stored.images, labels, index, counts, left_out)
