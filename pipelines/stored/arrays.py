"""Sets that are arrays: digits, CIFAR, STL-10, Fashion-MNIST and the skin lesions.

A reader returns a whole stored part with its labels; what is held out, limited or joined is decided in
`pipelines.sources`.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch

from pipelines.foreign import check_regular
from pipelines.stored.common import Part, Stored, download_or, missing, through_torchvision
from pipelines.stored.images import ArrayImages, DataError
from pipelines.subsets import stratified_draw

if TYPE_CHECKING:
    from pipelines.sources import DataConfig

DIGITS_TEST = 360


def read_digits(config: DataConfig, part: Part) -> Stored:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # 0..16 in steps of one; 255/16 is not whole, hence the rounding.
    gray = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    test = stratified_draw(labels, DIGITS_TEST, seed=0)
    rows = test if part == "test" else np.setdiff1d(np.arange(len(labels)), test)
    return Stored(
        ArrayImages(_gray_to_rgb(gray)).select(rows),
        torch.from_numpy(labels[rows]),
        tuple(str(digit) for digit in range(10)),
        torch.from_numpy(rows),
    )


def read_cifar(config: DataConfig, part: Part, *, name: str) -> Stored:
    from torchvision.datasets import CIFAR10, CIFAR100

    loader = CIFAR10 if name == "cifar10" else CIFAR100
    # The MD5 sums that torchvision checks are also what makes it safe to unpickle these files.
    stored = through_torchvision(
        config,
        lambda: loader(config.folder, train=part != "test", download=config.download),
        name,
        f"{loader.base_folder}/ with {', '.join(file for file, _ in loader.train_list + loader.test_list)}",
        f"{loader.filename} from https://www.cs.toronto.edu/~kriz/cifar.html",
    )
    targets, classes = stored.targets, stored.classes
    if name == "cifar20":
        folder = config.folder / loader.base_folder
        targets = _unpickle(folder / ("test" if part == "test" else "train"))["coarse_labels"]
        classes = _unpickle(folder / "meta")["coarse_label_names"]
    images = ArrayImages(np.ascontiguousarray(stored.data))
    return Stored(images, torch.tensor(targets, dtype=torch.int64), tuple(classes))


def _unpickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")


STL10_COUNTS = {"train": 5_000, "unlabeled": 100_000, "test": 8_000}
STL10_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def read_stl10(config: DataConfig, part: Part) -> Stored:
    # Not by torchvision, which sums 3 GB at every opening and holds the 100,000 images twice.
    from torchvision.datasets import STL10

    page = "stl10_binary.tar.gz from https://cs.stanford.edu/~acoates/stl10/"
    folder = config.folder / STL10.base_folder
    sizes = {f"{name}_X.bin": count * 3 * 96 * 96 for name, count in STL10_COUNTS.items()}
    sizes |= {f"{name}_y.bin": STL10_COUNTS[name] for name in ("train", "test")}
    wrong = [name for name, size in sizes.items() if _file_size(folder / name) != size]
    if wrong and config.download:
        through_torchvision(config, lambda: STL10(config.folder, download=True), "stl10", STL10.base_folder, page)
        wrong = [name for name, size in sizes.items() if _file_size(folder / name) != size]
    if wrong:
        raise missing(
            "stl10",
            config.folder,
            f"{STL10.base_folder}/ with {', '.join(sizes)} (absent or of the wrong size: {', '.join(wrong)})",
            download_or(page),
        )

    def pixels(name: str) -> np.ndarray:  # stored [N, 3, column, row]
        raw = np.memmap(folder / f"{name}_X.bin", dtype=np.uint8, mode="r", shape=(STL10_COUNTS[name], 3, 96, 96))
        return raw.transpose(0, 3, 2, 1)

    name = "test" if part == "test" else "train"
    labels = np.fromfile(folder / f"{name}_y.bin", dtype=np.uint8).astype(np.int64) - 1  # stored 1..10
    if labels.min() < 0 or labels.max() >= len(STL10_CLASSES):
        raise DataError(f"stl10: {name}_y.bin holds labels {labels.min() + 1} to {labels.max() + 1}, expected 1 to 10")
    parts = [pixels(name)]
    if part == "train+unlabelled":
        parts.append(pixels("unlabeled"))
        labels = np.concatenate([labels, np.full(STL10_COUNTS["unlabeled"], -1)])
    return Stored(ArrayImages(*parts), torch.from_numpy(labels), STL10_CLASSES)


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


MOST_FASHION = 60_000 * 28 * 28 + 16  # bytes of its largest file


def read_fashion_mnist(config: DataConfig, part: Part) -> Stored:
    from torchvision.datasets import FashionMNIST

    # It reads them whole, whatever they are.
    for path in (config.folder / "FashionMNIST" / "raw").glob("*-ubyte"):
        if not path.is_file() or path.stat().st_size > MOST_FASHION:
            raise DataError(f"fashion_mnist: {path} is no file of that set; unpack the original one again")
    stored = through_torchvision(
        config,
        lambda: FashionMNIST(config.folder, train=part != "test", download=config.download),
        "fashion_mnist",
        "FashionMNIST/raw/ with train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k",
        "the four files from https://github.com/zalandoresearch/fashion-mnist",
    )
    gray, targets = stored.data.numpy(), stored.targets.numpy()
    if gray.shape != (len(targets), 28, 28) or targets.ndim != 1 or targets.max(initial=0) >= len(stored.classes):
        raise DataError(
            f"fashion_mnist: {config.folder} holds images {gray.shape} and labels {targets.shape} up to "
            f"{targets.max(initial=0)}; unpack the original files again"
        )
    images = ArrayImages(_gray_to_rgb(gray))
    return Stored(images, stored.targets.to(torch.int64), tuple(stored.classes))


SKIN_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")  # ISIC 2018 task 3 (HAM10000), in its order


def read_skin(config: DataConfig, part: Part) -> Stored:
    from sklearn.model_selection import train_test_split
    from sklearn.utils import shuffle

    path = config.folder / "skin_rgb.npz"
    layout = f"skin_rgb.npz: x_train [N, H, W, 3] uint8, y_train [N] in 0..6 ({' '.join(SKIN_CLASSES)})"
    how = "build it, 128 x 128, from the HAM10000 images (ISIC 2018 task 3) of https://challenge.isic-archive.com"
    if not path.is_file():
        raise missing("skin", config.folder, layout, how)
    try:
        images, labels = read_npz(path, ("x_train", "y_train"))
        labels = labels.reshape(-1)
        if labels.dtype.kind not in "iuf":
            raise ValueError(f"y_train is {labels.dtype}")
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"skin: cannot read {path}: {error}; expected {layout}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != len(labels):
        raise DataError(
            f"skin: {path} holds x_train {images.dtype} {images.shape} and {len(labels)} labels; expected {layout}"
        )
    labels = labels.astype(np.int64)
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(SKIN_CLASSES):
        raise DataError(f"skin: {path} holds labels {labels.min()} to {labels.max()}; expected {layout}")
    # BeCLR's split: shuffled, then 85 % for training, not stratified. Rows are put back into stored order.
    train, test = train_test_split(shuffle(np.arange(len(labels)), random_state=0), train_size=0.85, random_state=0)
    rows = np.sort(test if part == "test" else train)
    return Stored(
        ArrayImages(images).select(rows), torch.from_numpy(labels[rows]), SKIN_CLASSES, torch.from_numpy(rows)
    )


def read_npz(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Arrays of an .npz, compressed or not; none is unpacked before it is known to be whole and to fit into memory.

    Raises:
        OSError, ValueError, KeyError: it cannot be read, is no .npz of plain numbers, or is too large; says why.
    """
    check_regular(path)
    total = 0
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                facts = archive.getinfo(f"{name}.npy")
                with archive.open(facts) as file:
                    version = np.lib.format.read_magic(file)
                    if version not in ((1, 0), (2, 0)):
                        raise ValueError(f"{name} has version {version} of NumPy's format")
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(file)
                    size, told = math.prod(shape) * dtype.itemsize, facts.file_size - file.tell()
                if dtype.hasobject:
                    raise ValueError(f"{name} holds pickled objects, which would be run")
                if min(shape, default=1) < 0 or size != told:
                    raise ValueError(f"{name} tells {shape} {dtype}, and has {told:,} bytes")
                total += size
        free = psutil.virtual_memory().available
        if total > 0.8 * free:
            raise ValueError(f"it unpacks to {total:,} bytes, and {free:,} are free")
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except (OSError, ValueError, KeyError):
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds
        raise ValueError(str(error) or type(error).__name__) from error


def _gray_to_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=3)
