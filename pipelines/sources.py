"""Named data sets and their splits: where they lie, how many images, which labels, which statistics.

    source = open_source(DataConfig(source="cifar10", download=True), "train")

Four splits. `train` is the labelled training part without what is held out; `holdout` is what is held out of
it, for choosing between models; `test` is the official test or validation part, to be looked at once;
`pretrain` is what self-supervised training sees: `train`, and the unlabelled images where a set has them.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from pipelines.config import LoaderConfig
from pipelines.packed.files import is_url
from pipelines.packed.opening import PackedSet, find_packed
from pipelines.stored import arrays, trees
from pipelines.stored.common import Fixed, Part, Stored, StoredSet, measured_statistics
from pipelines.stored.images import ArrayImages, DataError, FileImages, Images, decode
from pipelines.subsets import round_half_up, stratified_draw

__all__ = [
    "ArrayImages",
    "DataConfig",
    "DataError",
    "Description",
    "FileImages",
    "Images",
    "Source",
    "Split",
    "decode",
    "describe",
    "open_source",
]

Split = Literal["pretrain", "train", "holdout", "test"]


class DataConfig(LoaderConfig):
    """Which images, how they are divided, and how they are loaded."""

    source: str = "digits"
    root: Path | None = None  # where the data lies or is downloaded to; None: $TWINSTREAM_DATA, else ./data
    url: str | None = None  # instead of root: a packed set (tools.convert) behind s3://, https:// or what fsspec knows
    download: bool = False  # fetch what is missing, where torchvision can
    # Share of the labelled training part kept for choosing between models; None: 0.1 (of the digits, 240).
    holdout: float | None = Field(default=None, ge=0, lt=1)
    holdout_seed: int = Field(default=0, ge=0, lt=2**32)  # of the hold-out and of `limit`
    # At most this many images in `train` and in `pretrain`: for smoke runs.
    limit: int | None = Field(default=None, ge=1)
    class_list: Path | None = None  # with source=imagenet: a file with one wnid a line

    @property
    def folder(self) -> Path:
        """`root`, or its default."""
        return (self.root or Path(os.environ.get("TWINSTREAM_DATA", "data"))).expanduser()

    @field_validator("source")
    @classmethod
    def _known(cls, source: str) -> str:
        if source not in SETS:
            near = difflib.get_close_matches(source.lower(), SETS, n=3, cutoff=0.4)
            nearest = f"the nearest are {', '.join(near)}; " if near else ""
            raise ValueError(f"unknown data source {source!r}; {nearest}there are {', '.join(SETS)}")
        return source

    @field_validator("root", "class_list")
    @classmethod
    def _could_be_there(cls, path: Path | None) -> Path | None:
        try:
            if path is not None:
                os.stat(path.expanduser())
        except RuntimeError as error:
            raise ValueError(f"the home directory in {path} is not known") from error
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise ValueError("the path is too long for this machine") from error
        return path

    @model_validator(mode="after")
    def _one_place(self) -> DataConfig:
        if self.url is not None and self.root is not None:
            raise ValueError(f"data.url ({self.url}) and data.root ({self.root}) name two places; set one of them")
        if self.url is not None and not is_url(self.url):
            raise ValueError(f"data.url is {self.url!r}, expected protocol://...; for a folder set data.root")
        return self

    @model_validator(mode="after")
    def _class_list_has_a_use(self) -> DataConfig:
        if self.class_list is not None and self.source != "imagenet":
            raise ValueError(f"data.class_list chooses classes of source=imagenet, but the source is {self.source!r}")
        return self


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One opened split."""

    name: str
    split: Split
    images: Images
    labels: Tensor  # [N] int64, -1 unknown; multi-label: [N, C] float32, 1 present, 0 absent, -1 ignored
    ids: Tensor  # [N] int64, position in the stored part; unlabelled images count on from the labelled ones
    classes: tuple[str, ...]
    image_size: int  # the side that views are cut to, in pixels
    mean: tuple[float, float, float]  # of the channels, in [0, 1]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    def select(self, positions: Tensor | np.ndarray | Iterable[int]) -> Source:
        """The images at `positions` (whole numbers in [0, N), any order), under the same name and split.

        Raises:
            IndexError: a position outside the split.
            TypeError: a Boolean mask, which would be read as zeros and ones.
        """
        chosen = torch.as_tensor(positions if isinstance(positions, Tensor | np.ndarray) else list(positions))
        if chosen.numel() and (chosen.dtype == torch.bool or chosen.is_floating_point()):
            raise TypeError(f"select takes whole positions, got {chosen.dtype}; for a mask use mask.nonzero()[:, 0]")
        chosen = chosen.to(torch.int64).reshape(-1).cpu()
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(outside):
            raise IndexError(f"position {int(outside[0])} is outside {self.name}/{self.split} of {len(self):,} images")
        return replace(
            self, images=self.images.select(chosen.numpy()), labels=self.labels[chosen], ids=self.ids[chosen]
        )

    def fingerprint(self) -> str:
        """Hash of what the split contains: a key for whatever is computed from it and kept.

        Over the classes, labels and ids, and over the pixels of images in memory (about a gigabyte a second)
        or the names, sizes and modification times of files. The same on every run while the data stays as it
        is.
        """
        digest = hashlib.blake2b(digest_size=16)
        digest.update("\0".join((self.name, *self.classes)).encode())
        for tensor in (self.labels, self.ids):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        self.images.feed(digest)
        return digest.hexdigest()


def open_source(config: DataConfig, split: Split) -> Source:
    """Open one split. Files are listed, not decoded; arrays are loaded or mapped.

    Raises:
        DataError: the data is missing (the message says where it was looked for, what is expected there and
            how to get it) or broken, or the set has no such split.
    """
    if split not in get_args(Split):
        raise DataError(f"unknown split {split!r}; there are {', '.join(get_args(Split))}")
    known, packed = SETS[config.source], find_packed(config)
    if split == "test":
        stored = read_part(config, "test", packed)
        rows = np.arange(len(stored.images))
    else:
        stored = read_part(config, _part(known, split), packed)
        rows = _rows(config, known, split, stored.labels.numpy())
    # Measured on the whole training part, so that they depend neither on the split nor on the hold-out.
    told = None if packed is None else packed.manifest.statistics
    measured = told is None and (known.statistics is None or known.image_size is None)
    train = read_part(config, "train", packed) if split == "test" and measured else stored
    mean, std = known.statistics or ((told.mean, told.std) if told else measured_statistics(train.images))
    whole = Source(
        name=config.source,
        split=split,
        images=stored.images,
        labels=stored.labels,
        ids=torch.arange(len(stored.images)) if stored.ids is None else stored.ids,
        classes=stored.classes,
        image_size=known.image_size or (told.image_size if told else side_of(train.images)),
        mean=mean,
        std=std,
    )
    return whole if len(rows) == len(whole) else whole.select(rows)


def read_part(config: DataConfig, part: Part, packed: PackedSet | None = None) -> Stored:
    """A stored part, whole: from the packed set, if there is one, or as its source keeps it."""
    try:
        return SETS[config.source].read(config, part) if packed is None else packed.read(config, part)
    except OSError as error:  # a folder that may not be entered, a disk that fails
        raise DataError(f"{config.source}: cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class Description:
    """What can be said of a configuration without loading an image."""

    source: str
    counts: Mapping[Split, int | None]  # images a split; None where there is no such split, or it is not here
    num_classes: int
    image_size: int


def describe(config: DataConfig) -> Description:
    """Count images and classes, to validate a recipe before anything expensive starts.

    Sets whose files are fixed (digits, CIFAR, STL-10, Fashion-MNIST) are described from memory, whether or
    not they are on this machine; trees of files are listed, and `folder` reads image headers too.

    Raises:
        DataError: a set that has to be looked at is missing or broken.
    """
    known, packed = SETS[config.source], find_packed(config)
    counts: dict[Split, int | None]
    if known.fixed is not None and packed is None:
        held = _held_out(config, known, known.fixed.train)
        train = known.fixed.train - held
        limit = config.limit or known.fixed.train + known.fixed.unlabelled
        counts = {
            "pretrain": min(train + known.fixed.unlabelled, limit),
            "train": min(train, limit),
            "holdout": held or None,
            "test": known.fixed.test,
        }
        return Description(config.source, counts, known.fixed.classes, known.image_size or 0)

    counts = {}
    stored = read_part(config, "train", packed)
    for split in get_args(Split):
        try:
            if split == "test":
                counts[split] = len(read_part(config, "test", packed).images)
            else:
                part = stored if split != "pretrain" else read_part(config, _part(known, split), packed)
                counts[split] = len(_rows(config, known, split, part.labels.numpy()))
        except DataError:
            counts[split] = None
    told = None if packed is None else packed.manifest.statistics
    size = known.image_size or (told.image_size if told else side_of(stored.images))
    return Description(config.source, counts, len(stored.classes), size)


def side_of(images: Images) -> int:
    """The short side of images that share one size, else 224."""
    return 224 if images.size is None else min(images.size)


def _part(known: StoredSet, split: Split) -> Part:
    unlabelled = known.fixed is not None and known.fixed.unlabelled > 0
    return "train+unlabelled" if split == "pretrain" and unlabelled else "train"


def _rows(config: DataConfig, known: StoredSet, split: Split, labels: np.ndarray) -> np.ndarray:
    """Which rows of the stored training part make up a split: ascending positions."""
    labelled = np.arange(len(labels)) if labels.ndim == 2 else np.flatnonzero(labels >= 0)
    if split != "pretrain" and not len(labelled):
        raise DataError(f"{config.source}: its images have no labels, so there is no {split!r} split; use 'pretrain'")
    held = _held_out(config, known, len(labelled))
    if labels.ndim == 2:  # several labels an image: no strata
        away = np.sort(np.random.RandomState(config.holdout_seed).permutation(len(labelled))[:held])
    else:
        away = labelled[stratified_draw(labels[labelled], held, config.holdout_seed, leave=1)]
    if split == "holdout":
        if not len(away):
            raise DataError(
                f"{config.source}: nothing is held out of {len(labelled):,} labelled images (asked for: "
                f"{held}; every class keeps one to train on); set a larger data.holdout, or add images"
            )
        return away

    rows = np.setdiff1d(labelled if split == "train" else np.arange(len(labels)), away, assume_unique=True)
    if config.limit is None or config.limit >= len(rows):
        return rows
    strata = labels[rows] if labels.ndim == 1 else np.zeros(len(rows), dtype=np.int64)
    return rows[stratified_draw(strata, config.limit, config.holdout_seed)]


def _held_out(config: DataConfig, known: StoredSet, labelled: int) -> int:
    if config.holdout is None and known.held_out is not None:
        return known.held_out
    return round_half_up(labelled * (0.1 if config.holdout is None else config.holdout))


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# CIFAR's and tiny-imagenet's deviations are over all pixels. The smaller ones in circulation (0.2023 ... for
# CIFAR-10) average the deviations of single images.
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
CIFAR = 50_000, 10_000

SETS: Mapping[str, StoredSet] = {
    "digits": StoredSet(
        arrays.read_digits,
        8,
        fixed=Fixed(1_797 - arrays.DIGITS_TEST, arrays.DIGITS_TEST, classes=10),
        held_out=240,
    ),
    "cifar10": StoredSet(partial(arrays.read_cifar, name="cifar10"), 32, CIFAR10, Fixed(*CIFAR, classes=10)),
    "cifar100": StoredSet(partial(arrays.read_cifar, name="cifar100"), 32, CIFAR100, Fixed(*CIFAR, classes=100)),
    "cifar20": StoredSet(partial(arrays.read_cifar, name="cifar20"), 32, CIFAR100, Fixed(*CIFAR, classes=20)),
    "stl10": StoredSet(
        arrays.read_stl10,
        96,
        ((0.4409, 0.4279, 0.3867), (0.2683, 0.2610, 0.2686)),
        Fixed(5_000, 8_000, classes=10, unlabelled=100_000),
    ),
    "fashion_mnist": StoredSet(
        arrays.read_fashion_mnist, 28, ((0.2860,) * 3, (0.3530,) * 3), Fixed(60_000, 10_000, classes=10)
    ),
    "folder": StoredSet(trees.read_folder),
    "imagenet": StoredSet(trees.read_imagenet, 224, IMAGENET),
    "imagenet50": StoredSet(partial(trees.read_imagenet, subset=50), 224, IMAGENET),
    "imagenet100": StoredSet(partial(trees.read_imagenet, subset=100), 224, IMAGENET),
    "imagenet200": StoredSet(partial(trees.read_imagenet, subset=200), 224, IMAGENET),
    "tiny_imagenet": StoredSet(trees.read_tiny_imagenet, 64, ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821))),
    # VOC 2012's, the nearest published: the same source of photographs.
    "voc07": StoredSet(trees.read_voc07, 224, ((0.457, 0.438, 0.406), (0.239, 0.235, 0.240))),
    "skin": StoredSet(arrays.read_skin, 128, ((0.7630, 0.5463, 0.5706), (0.141, 0.153, 0.169))),
}
