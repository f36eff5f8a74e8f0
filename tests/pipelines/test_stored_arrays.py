"""CIFAR, STL-10, Fashion-MNIST and skin, written in their own formats and read back."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from sklearn.model_selection import train_test_split
from sklearn.utils import shuffle

from pipelines.sources import DataConfig, DataError, open_source
from pipelines.stored import arrays
from tests.pipelines.stored_sets import as_list, noise


def dump(path: Path, content: dict) -> tuple[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path.name, hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray, list[int]]:
    """Five batches of 20 images and one of 10, as rows of 3,072 bytes, with torchvision's MD5 table set to
    them."""
    folder, rows, labels = tmp_path / "cifar-10-batches-py", noise(110, 3072), [i % 10 for i in range(110)]
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    sums = []
    for index, name in enumerate(names):
        part = slice(index * 20, index * 20 + 20)
        sums.append(dump(folder / name, {"data": rows[part], "labels": labels[part]}))
    words = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    _, meta = dump(folder / "batches.meta", {"label_names": words})
    loader = torchvision.datasets.CIFAR10
    monkeypatch.setattr(loader, "train_list", sums[:5])
    monkeypatch.setattr(loader, "test_list", sums[5:])
    monkeypatch.setattr(loader, "meta", {**loader.meta, "md5": meta})
    return tmp_path, rows, labels


def test_cifar10_pixels_labels_and_splits(cifar10: tuple[Path, np.ndarray, list[int]]) -> None:
    root, rows, labels = cifar10
    config = DataConfig(source="cifar10", root=root)
    train, held, test = (open_source(config, split) for split in ("train", "holdout", "test"))
    assert (len(train), len(held), len(test)) == (90, 10, 10)
    assert held.labels.bincount().tolist() == [1] * 10
    assert sorted(as_list(train) + as_list(held)) == list(range(100))
    stored = as_list(train)[7]
    # A row is 1,024 red, then green, then blue values, row by row.
    assert train.images[7][2, 5].tolist() == [rows[stored][c * 1024 + 2 * 32 + 5] for c in range(3)]
    assert train.labels[7] == labels[stored]
    assert test.images.array is not None
    assert np.array_equal(test.images.array[3].transpose(2, 0, 1).reshape(-1), rows[103])
    assert train.classes[1] == "automobile"
    assert (train.image_size, train.mean[0], train.std[0]) == (32, 0.4914, 0.2470)


def test_an_altered_cifar_file_is_never_unpickled(cifar10: tuple[Path, np.ndarray, list[int]]) -> None:
    root, *_ = cifar10
    with (root / "cifar-10-batches-py" / "data_batch_3").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match="incomplete or altered"):
        open_source(DataConfig(source="cifar10", root=root), "train")


def test_cifar20_reads_the_coarse_labels_of_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, loader = tmp_path / "cifar-100-python", torchvision.datasets.CIFAR100
    fine = [i % 100 for i in range(200)]
    coarse = [(i * 7) % 20 for i in fine]
    content: dict[str, Any] = {"data": noise(200, 3072), "fine_labels": fine, "coarse_labels": coarse}
    monkeypatch.setattr(loader, "train_list", [dump(folder / "train", content)])
    tested = {key: values[:100] for key, values in content.items()}
    monkeypatch.setattr(loader, "test_list", [dump(folder / "test", tested)])
    words = {
        "fine_label_names": [f"fine{i}" for i in range(100)],
        "coarse_label_names": [f"coarse{i}" for i in range(20)],
    }
    monkeypatch.setattr(loader, "meta", {**loader.meta, "md5": dump(folder / "meta", words)[1]})

    whole = open_source(DataConfig(source="cifar20", root=tmp_path, holdout=0.0), "train")
    assert whole.labels.tolist() == coarse
    assert whole.classes == tuple(words["coarse_label_names"])
    hundred = open_source(DataConfig(source="cifar100", root=tmp_path, holdout=0.0), "train")
    assert hundred.labels.tolist() == fine
    assert hundred.num_classes == 100
    assert hundred.mean == whole.mean == (0.5071, 0.4865, 0.4409)
    assert hundred.fingerprint() != whole.fingerprint()  # other labels


def test_stl10_agrees_with_torchvision_and_adds_the_unlabelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    counts = {"train": 20, "unlabeled": 30, "test": 10}
    for seed, (name, count) in enumerate(counts.items()):
        noise(count, 3, 96, 96, seed=seed).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    monkeypatch.setattr(arrays, "STL10_COUNTS", counts)
    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    theirs = torchvision.datasets.STL10(tmp_path, split="train+unlabeled")

    config = DataConfig(source="stl10", root=tmp_path, holdout=0.5)
    train, held, pretrain, test = (open_source(config, s) for s in ("train", "holdout", "pretrain", "test"))
    assert (len(train), len(held), len(pretrain), len(test)) == (10, 10, 40, 10)
    assert as_list(pretrain) == as_list(train) + list(range(20, 50))
    assert pretrain.labels[10:].tolist() == [-1] * 30
    array = pretrain.images.array
    assert array is not None
    for position in (0, 9, 10, 39):
        picture, label = theirs[as_list(pretrain)[position]]
        assert np.array_equal(pretrain.images[position], np.asarray(picture))
        assert np.array_equal(array[position], np.asarray(picture))
        assert pretrain.labels[position] == label
    assert test.labels.tolist() == list(range(10))
    assert train.std == (0.2683, 0.2610, 0.2686)
    # A limit thins out labelled and unlabelled images alike.
    assert (open_source(config.model_copy(update={"limit": 20}), "pretrain").labels < 0).sum() == 15

    with (folder / "unlabeled_X.bin").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=r"wrong size: unlabeled_X\.bin"):
        open_source(config, "train")


def test_fashion_mnist_becomes_three_equal_channels(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = {"train": noise(40, 28, 28), "t10k": noise(10, 28, 28, seed=1)}
    for name, gray in pixels.items():
        count = len(gray)
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + gray.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = struct.pack(">2i", 0x801, count)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    test = open_source(DataConfig(source="fashion_mnist", root=tmp_path), "test")
    assert test.images.array is not None
    assert test.images.array.shape == (10, 28, 28, 3)
    for channel in range(3):
        assert np.array_equal(test.images.array[..., channel], pixels["t10k"])
    assert test.labels.tolist() == list(range(10))
    assert (test.image_size, test.mean, test.std) == (28, (0.2860,) * 3, (0.3530,) * 3)


def test_skin_is_split_as_beclr_split_it(tmp_path: Path) -> None:
    images, labels = noise(200, 16, 16, 3), np.random.default_rng(1).integers(0, 7, 200)
    np.savez(tmp_path / "skin_rgb.npz", x_train=images, y_train=labels)
    # As the published code has it: shuffle images and labels together, then split them.
    x, y = shuffle(images, labels, random_state=0)
    x_train, x_test, y_train, y_test = train_test_split(x, y, train_size=0.85, random_state=0)

    config = DataConfig(source="skin", root=tmp_path, holdout=0.0)
    train, test = open_source(config, "train"), open_source(config, "test")

    def content(pictures: np.ndarray, classes: np.ndarray) -> list[tuple[bytes, int]]:
        return sorted((p.tobytes(), int(c)) for p, c in zip(pictures, classes, strict=True))

    assert content(train.images.array, train.labels) == content(x_train, y_train)  # type: ignore[arg-type]
    assert content(test.images.array, test.labels) == content(x_test, y_test)  # type: ignore[arg-type]
    assert np.array_equal(test.images[4], images[as_list(test)[4]])
    assert (test.image_size, test.classes[2], test.mean[0]) == (128, "BCC", 0.7630)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x_train": noise(4, 8, 8, 3)}, "y_train"),
        ({"x_train": noise(4, 8, 8, 3), "y_train": np.array([0, 1, 2, 7])}, "labels 0 to 7"),
        ({"x_train": np.zeros((4, 8, 8, 3), np.float32), "y_train": np.zeros(4)}, "float32"),
        ({"x_train": noise(4, 8, 8, 3), "y_train": np.array([{}] * 4, dtype=object)}, "pickled objects"),
    ],
)
def test_a_bad_skin_file_is_refused(content: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "skin_rgb.npz", **content)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(source="skin", root=tmp_path), "train")
