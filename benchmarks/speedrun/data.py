"""CIFAR-10, or scikit-learn's digits, as uint8 tensors: a training part, a held-out part of it and the test split."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SUFFIXES = (".jpg", ".jpeg", ".png")
_HOLDOUT, _DIGITS_TEST = 0.1, 0.2  # shares


class DataError(Exception):
    """The data is missing or not what was expected; the message says which."""


@dataclass(frozen=True, slots=True)
class Part:
    images: Tensor  # [N, H, W, 3] uint8
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Part:
        return Part(self.images.to(device), self.labels.to(device))

    def select(self, rows: Tensor) -> Part:
        return Part(self.images[rows], self.labels[rows])


@dataclass(frozen=True, slots=True)
class Data:
    train: Part  # pretrained on, without labels; with them, the bank of kNN and what linear is fitted to
    holdout: Part  # settings are chosen by it
    test: Part
    classes: int
    mean: tuple[float, ...]  # of the training part's channels, in [0, 1]
    std: tuple[float, ...]

    @property
    def side(self) -> int:
        return self.train.images.shape[1]

    def to(self, device: torch.device) -> Data:
        train, holdout, test = (part.to(device) for part in (self.train, self.holdout, self.test))
        return replace(self, train=train, holdout=holdout, test=test)


def load(where: str, *, images: int | None = None, held: int | None = None) -> Data:
    """`where` is "digits", a folder with train/CLASS/ and test/CLASS/ of JPEG or PNG files, or one that holds
    torchvision's CIFAR-10. A tenth of the training part is held out, drawn as evaluate.py draws its own. `images` and
    `held` limit what is left and what is held out, in equal parts of the classes.

    Raises:
        DataError: no such folder, no images in it, or images that are not all of one square size.
    """
    train, test = _digits() if where == "digits" else _stored(Path(where))
    classes = int(train.labels.max()) + 1
    labels = train.labels.numpy()
    out = stratified(labels, _HOLDOUT)
    kept = torch.ones(len(train), dtype=torch.bool)
    kept[out] = False
    rows, out = _limited(labels, kept.nonzero()[:, 0], images), _limited(labels, out, held)
    part = train.select(rows)
    pixels = part.images.double().div(255).flatten(0, 2)
    mean, std = pixels.mean(0).tolist(), pixels.std(0).tolist()
    return Data(part, train.select(out), test, classes, tuple(mean), tuple(std))


def _limited(labels: np.ndarray, rows: Tensor, most: int | None) -> Tensor:
    return rows if most is None or most >= len(rows) else rows[stratified(labels[rows.numpy()], most / len(rows))]


def stratified(labels: np.ndarray, share: float) -> Tensor:
    """Positions, ascending, of a share of each class: the draw of `pipelines.subsets` where classes are equally large,
    so that what is held out of CIFAR-10 here is what evaluate.py holds out."""
    shuffled = np.random.RandomState(0).permutation(len(labels))
    classes = (shuffled[labels[shuffled] == label] for label in np.unique(labels))
    return torch.from_numpy(np.sort(np.concatenate([rows[: round(share * len(rows))] for rows in classes])))


def _stored(folder: Path) -> tuple[Part, Part]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    if any((folder / name).is_dir() for name in ("train", "test")):
        names = sorted(path.name for path in (folder / "train").glob("*") if path.is_dir())
        return _folder(folder / "train", names), _folder(folder / "test", names)
    if (folder / "cifar-10-batches-py").is_dir():
        from torchvision.datasets import CIFAR10

        try:
            return _arrays(CIFAR10(str(folder), train=True)), _arrays(CIFAR10(str(folder), train=False))
        except (RuntimeError, OSError, EOFError) as failure:
            raise DataError(f"torchvision cannot read CIFAR-10 in {folder}: {failure}") from failure
    raise DataError(f"{folder} holds neither train/CLASS/ and test/CLASS/ nor torchvision's cifar-10-batches-py")


def _arrays(stored: object) -> Part:
    images, labels = getattr(stored, "data"), getattr(stored, "targets")  # noqa: B009  (torchvision's have no types)
    return Part(torch.from_numpy(images), torch.tensor(labels))


def _folder(folder: Path, names: Sequence[str]) -> Part:
    paths, labels = [], []
    for label, name in enumerate(names):
        found = sorted(path for path in (folder / name).glob("*") if path.suffix.lower() in _SUFFIXES)
        paths += found
        labels += [label] * len(found)
    if not paths or len(set(labels)) < len(names):
        raise DataError(f"{folder}: expected JPEG or PNG images of each class of the training part")
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(_decoded, paths))
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1 or len(set(next(iter(shapes))[:2])) > 1:
        raise DataError(
            f"{folder}: expected images of one square size, found {len(shapes)} shapes, {min(shapes)} for one"
        )
    return Part(torch.stack(images), torch.tensor(labels))


def _decoded(path: Path) -> Tensor:
    """[H, W, 3] uint8."""
    from torchvision.io import ImageReadMode, decode_image

    try:
        return decode_image(str(path), ImageReadMode.RGB).permute(1, 2, 0)
    except RuntimeError as failure:
        raise DataError(f"{path} is no image that can be read: {str(failure).splitlines()[0]}") from failure


def _digits() -> tuple[Part, Part]:
    """8 x 8 pixels, enlarged to 16 x 16; a fifth is the test split."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = torch.from_numpy(found.images.astype(np.float32))[:, None] / 16 * 255
    grey = F.interpolate(grey, size=16, mode="bilinear", antialias=True).round().clamp(0, 255).to(torch.uint8)
    images = grey.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
    labels = torch.from_numpy(found.target).long()
    test = torch.zeros(len(labels), dtype=torch.bool)
    test[stratified(found.target, _DIGITS_TEST)] = True
    return Part(images[~test], labels[~test]), Part(images[test], labels[test])
