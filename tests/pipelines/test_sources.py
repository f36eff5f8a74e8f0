"""Named sets and splits, each against a small tree in its own on-disk format, and against real images if
present."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils import shuffle

from pipelines import sources
from pipelines.sources import DataConfig, DataError, Source, decode, describe, open_source
from pipelines.stored import arrays
from pipelines.stored.images import ArrayImages, FileImages, stored_size

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


# Digits.


def test_digits_splits_have_the_promised_sizes_and_make_up_the_set() -> None:
    train, held, test = (open_source(DataConfig(), split) for split in ("train", "holdout", "test"))
    assert [len(train), len(held), len(test)] == [1197, 240, 360]
    assert sorted(as_list(train) + as_list(held) + as_list(test)) == list(range(1797))

    bunch = load_digits()
    for source in (train, held, test):
        assert source.labels.tolist() == bunch.target[source.ids].tolist()
        stored = bunch.images[as_list(source)[5]]
        assert np.abs(source.images[5].astype(float) - stored[..., None] * 255 / 16).max() <= 0.5
    assert train.images[0].shape == (8, 8, 3)
    assert train.image_size == 8


def test_digits_splits_are_as_even_as_scikit_learns() -> None:
    target = load_digits().target
    _, expected = train_test_split(target, test_size=360, stratify=target, random_state=3)
    counts = open_source(DataConfig(), "test").labels.bincount().numpy()
    assert counts.sum() == 360
    assert np.abs(counts - np.bincount(expected)).max() <= 1
    exact = np.bincount(target) * 360 / 1797
    assert np.abs(counts - exact).max() < 1


def test_digits_statistics_are_those_of_what_is_not_tested() -> None:
    test = set(as_list(open_source(DataConfig(), "test")))
    kept = np.stack([image for i, image in enumerate(load_digits().images) if i not in test])
    source = open_source(DataConfig(holdout=0.5, limit=20), "train")
    assert source.mean == pytest.approx([kept.mean() / 16] * 3, abs=1e-3)  # rounding to 8 bits
    assert source.std == pytest.approx([kept.std() / 16] * 3, abs=1e-3)


def test_pretrain_of_a_labelled_set_is_train() -> None:
    train, pretrain = (open_source(DataConfig(limit=300), split) for split in ("train", "pretrain"))
    assert as_list(train) == as_list(pretrain)
    assert len(train) == 300


def test_splits_are_the_same_every_time_and_move_with_the_seed() -> None:
    first, again, other = (open_source(DataConfig(holdout_seed=seed), "holdout") for seed in (0, 0, 1))
    assert as_list(first) == as_list(again)
    assert first.fingerprint() == again.fingerprint()
    assert as_list(first) != as_list(other)
    assert first.fingerprint() != other.fingerprint()
    # The test part does not move.
    assert as_list(open_source(DataConfig(holdout_seed=1), "test")) == as_list(open_source(DataConfig(), "test"))


def test_holdout_share_and_limit_are_counted() -> None:
    config = DataConfig(holdout=0.25, limit=100)
    assert len(open_source(config, "holdout")) == 359  # of 1,437
    limited = open_source(config, "train")
    assert len(limited) == 100
    assert limited.labels.bincount().tolist() == pytest.approx([10] * 10, abs=1)
    assert not set(as_list(limited)) & set(as_list(open_source(config, "holdout")))
    assert len(open_source(DataConfig(holdout=0.0), "train")) == 1437
    with pytest.raises(DataError, match=r"nothing is held out.*data\.holdout"):
        open_source(DataConfig(holdout=0.0), "holdout")
    with pytest.raises(DataError, match="unknown split 'val'"):
        open_source(DataConfig(), "val")  # type: ignore[arg-type]


# Configuration.


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("cifar-10", "cifar10"),
        ("tinyimagenet", "tiny_imagenet"),
        ("CIFAR100", "cifar100"),
        ("fashionmnist", "fashion_"),
    ],
)
def test_a_wrong_source_names_the_nearest(wrong: str, nearest: str) -> None:
    with pytest.raises(ValidationError, match=f"{wrong}.*nearest are.*{nearest}"):
        DataConfig(source=wrong)


def test_config_refuses_what_makes_no_sense() -> None:
    for bad in ({"holdout": 1.0}, {"holdout": -0.1}, {"limit": 0}, {"sauce": "digits"}):
        with pytest.raises(ValidationError):
            DataConfig(**bad)
    with pytest.raises(ValidationError, match="class_list"):
        DataConfig(source="cifar10", class_list=Path("list.txt"))


def test_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TWINSTREAM_DATA", raising=False)
    assert DataConfig().folder == Path("data")
    monkeypatch.setenv("TWINSTREAM_DATA", str(tmp_path))
    assert DataConfig().folder == tmp_path
    assert DataConfig(root=Path("elsewhere")).folder == Path("elsewhere")


@pytest.mark.parametrize("name", [name for name in sources.SETS if name != "digits"])
def test_missing_data_says_where_what_and_how(name: str, tmp_path: Path) -> None:
    config = DataConfig(source=name, root=tmp_path / "nothing")
    for split in ("pretrain", "train", "holdout", "test"):
        with pytest.raises(DataError) as caught:
            open_source(config, split)
        message = str(caught.value)
        assert name in message
        assert str(tmp_path / "nothing") in message
        downloads = name.startswith(("cifar", "stl", "fashion", "voc"))
        assert ("data.download=true" in message) == downloads
        assert downloads or "http" in message or name == "folder"
        assert "data.root" in message


def test_a_failed_download_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: object) -> None:
        raise OSError("name resolution failed")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", unreachable)
    with pytest.raises(DataError, match=r"downloading to .* failed: name resolution failed.*cs\.toronto"):
        open_source(DataConfig(source="cifar10", root=tmp_path, download=True), "train")


# CIFAR, STL-10, Fashion-MNIST, skin.


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
        ({"x_train": noise(4, 8, 8, 3), "y_train": np.array([{}] * 4, dtype=object)}, "allow_pickle"),
    ],
)
def test_a_bad_skin_file_is_refused(content: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "skin_rgb.npz", **content)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(source="skin", root=tmp_path), "train")


# Folders and ImageNet.


def test_folder_reads_what_image_folder_reads(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", {"dog": 10, "cat": 20})
    write_tree(tmp_path / "val", {"cat": 3, "dog": 2}, suffix=".JPG")
    write_image(tmp_path / "train" / "cat" / "deeper" / "x.Jpeg")
    write_image(tmp_path / "train" / "cat" / ".hidden.png")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")

    theirs = torchvision.datasets.ImageFolder(tmp_path / "train")
    expected = [(Path(path), label) for path, label in theirs.samples if not Path(path).name.startswith(".")]
    config = DataConfig(source="folder", root=tmp_path, holdout=0.0)
    train, test = open_source(config, "train"), open_source(config, "test")
    assert isinstance(train.images, FileImages)
    assert {(train.images.path(i), int(train.labels[i])) for i in range(len(train))} == set(expected)
    assert [train.images.path(i) for i in range(len(train))] == sorted(path for path, _ in expected)
    assert train.classes == test.classes == ("cat", "dog")
    assert test.labels.tolist() == [0, 0, 0, 1, 1]
    assert np.array_equal(train.images[30], noise(8, 10, 3, seed=9))
    assert train.images.read(30) == (tmp_path / "train" / "dog" / "009.png").read_bytes()
    assert train.images.array is None


def test_folder_of_classes_alone_is_all_training_data(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 20, "b": 10})
    config = DataConfig(source="folder", root=tmp_path, holdout=0.2)
    train, held = open_source(config, "train"), open_source(config, "holdout")
    assert (train.labels.bincount().tolist(), held.labels.bincount().tolist()) == ([16, 8], [4, 2])
    with pytest.raises(DataError, match=r"no test images.*'holdout'"):
        open_source(config, "test")
    assert describe(config).counts == {"pretrain": 24, "train": 24, "holdout": 6, "test": None}


def test_folder_of_unlabelled_images(tmp_path: Path) -> None:
    for index in range(5):
        write_image(tmp_path / f"{index}.png", size=(30, 20))
    config = DataConfig(source="folder", root=tmp_path)
    pretrain = open_source(config, "pretrain")
    assert pretrain.labels.tolist() == [-1] * 5
    assert pretrain.num_classes == 0
    for split in ("train", "holdout"):
        with pytest.raises(DataError, match="no labels"):
            open_source(config, split)
    assert describe(config).counts == {"pretrain": 5, "train": None, "holdout": None, "test": None}


def test_test_wins_over_val_and_either_needs_train(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 1), ("test", 2)):
        write_tree(tmp_path / part, {"a": count})
    assert len(open_source(DataConfig(source="folder", root=tmp_path), "test")) == 2
    (tmp_path / "train").rename(tmp_path / "other")
    with pytest.raises(DataError, match="test and val/ but no train/"):
        open_source(DataConfig(source="folder", root=tmp_path), "train")


def test_empty_and_unknown_classes_are_named(tmp_path: Path) -> None:
    write_tree(tmp_path / "train", {"a": 2, "b": 2})
    write_tree(tmp_path / "val", {"a": 2})
    config = DataConfig(source="folder", root=tmp_path)
    with pytest.warns(UserWarning, match="no images of 1 of 2 classes: b"):
        assert open_source(config, "test").labels.tolist() == [0, 0]
    (tmp_path / "train" / "zebra").mkdir()
    with pytest.raises(DataError, match="no images of 1 of 3 classes: zebra"):
        open_source(config, "train")
    (tmp_path / "train" / "zebra").rmdir()
    write_tree(tmp_path / "val", {"yak": 1})
    with pytest.raises(DataError, match="do not have: yak"):
        open_source(config, "test")


def test_folder_size_and_statistics_are_measured(tmp_path: Path) -> None:
    pixels = []
    for index in range(12):
        path = write_image(tmp_path / "a" / f"{index}.png", size=(20, 14), seed=index)
        image = np.asarray(Image.open(path)) // [1, 2, 4]
        Image.fromarray(image.astype(np.uint8)).save(path)
        pixels.append(image)
    config = DataConfig(source="folder", root=tmp_path)
    source = open_source(config, "holdout")
    assert source.images.size == (14, 20)
    assert source.image_size == describe(config).image_size == 14
    values = np.stack(pixels).reshape(-1, 3) / 255
    assert source.mean == pytest.approx(values.mean(0))
    assert source.std == pytest.approx(values.std(0))

    write_image(tmp_path / "a" / "odd.png", size=(21, 14))
    assert open_source(config, "train").images.size is None
    assert describe(config).image_size == 224


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for part, count in (("train", 4), ("val", 2)):
        write_tree(tmp_path / "imagenet" / part, {"n03": count, "n01": count, "n02": count}, suffix=".JPEG")
    return tmp_path


def test_imagenet_and_its_subsets(imagenet: Path) -> None:
    whole = open_source(DataConfig(source="imagenet", root=imagenet, holdout=0.25), "train")
    assert whole.classes == ("n01", "n02", "n03")
    assert whole.labels.bincount().tolist() == [3, 3, 3]
    assert (whole.image_size, whole.mean) == (224, (0.485, 0.456, 0.406))

    chosen = imagenet / "mine.txt"
    chosen.write_text("# mine\nn03 third thing\nn01\n")
    part = open_source(DataConfig(source="imagenet", root=imagenet, class_list=chosen), "test")
    assert part.classes == ("n03", "n01")
    assert isinstance(part.images, FileImages)
    assert [part.images.path(i).parent.name for i in range(4)] == ["n03", "n03", "n01", "n01"]
    assert part.labels.tolist() == [0, 0, 1, 1]

    chosen.write_text("n03\nn99\n")
    with pytest.raises(DataError, match=r"imagenet: .* no images of 1 of 2 classes: n99"):
        open_source(DataConfig(source="imagenet", root=imagenet, class_list=chosen), "train")
    chosen.write_text("n03\nn03\n")
    with pytest.raises(DataError, match="names twice: n03"):
        open_source(DataConfig(source="imagenet", root=imagenet, class_list=chosen), "train")

    (imagenet / "imagenet50.txt").write_text("n02\n")
    assert open_source(DataConfig(source="imagenet50", root=imagenet), "test").classes == ("n02",)
    with pytest.raises(DataError, match=r"imagenet100: .* no images of 100 of 100 classes"):
        open_source(DataConfig(source="imagenet100", root=imagenet), "train")


def test_flat_imagenet_validation_images_are_refused(imagenet: Path) -> None:
    (imagenet / "imagenet" / "val").rename(imagenet / "sorted")
    write_image(imagenet / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(DataError, match="sort the validation images"):
        open_source(DataConfig(source="imagenet", root=imagenet), "test")


def test_shipped_class_lists_are_nested() -> None:
    lists = Path(sources.__file__).parent / "lists"
    names = {k: sources.trees.read_class_list(lists / f"imagenet{k}.txt") for k in (50, 100, 200)}
    for k, wnids in names.items():
        assert len(set(wnids)) == k
        assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for wnid in wnids)
    assert set(names[50]) < set(names[100]) < set(names[200])


@pytest.mark.parametrize("arranged", [False, True])
def test_tiny_imagenet_in_both_layouts(arranged: bool, tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    for wnid in ("n2", "n1"):
        for index in range(10):
            write_image(root / "train" / wnid / "images" / f"{wnid}_{index}.JPEG", size=(64, 64))
    lines = []
    for index, wnid in enumerate(["n2", "n1", "n2"]):
        where = root / "val" / wnid if arranged else root / "val" / "images"
        write_image(where / f"val_{index}.JPEG", size=(64, 64))
        lines.append(f"val_{index}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    if not arranged:
        (root / "val" / "val_annotations.txt").write_text("".join(lines))

    config = DataConfig(source="tiny_imagenet", root=tmp_path)
    train, test = open_source(config, "train"), open_source(config, "test")
    assert train.classes == test.classes == ("n1", "n2")
    assert train.labels.bincount().tolist() == [9, 9]
    assert isinstance(test.images, FileImages)
    found = {test.images.path(i).name: test.classes[test.labels[i]] for i in range(3)}
    assert found == {"val_0.JPEG": "n2", "val_1.JPEG": "n1", "val_2.JPEG": "n2"}
    assert (train.image_size, train.images.size) == (64, (64, 64))


def test_voc07_labels_and_their_difficult_ones(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2007"
    objects = {
        "000001": [("dog", 0), ("person", 1), ("person", 0)],
        "000002": [("tvmonitor", 1), ("aeroplane", 0)],
        "000003": [("cat", 1), ("cat", 1)],
    }
    for stem, found in objects.items():
        write_image(root / "JPEGImages" / f"{stem}.jpg")
        body = "".join(
            f"<object><name>{n}</name><difficult>{d}</difficult><part><name>head</name></part></object>"
            for n, d in found
        )
        (root / "Annotations").mkdir(exist_ok=True)
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{body}</annotation>")
    main = root / "ImageSets" / "Main"
    main.mkdir(parents=True)
    (main / "trainval.txt").write_text("000001\n000002\n")
    (main / "test.txt").write_text("000003\n")

    config = DataConfig(source="voc07", root=tmp_path, holdout=0.0)
    train, test = open_source(config, "train"), open_source(config, "test")
    assert train.multi_label
    assert train.labels.dtype == torch.float32
    assert train.classes == tuple(sorted(train.classes))
    rows = (*train.labels, *test.labels)
    named = [{train.classes[c]: row[c].item() for c in row.nonzero()[:, 0]} for row in rows]
    assert named == [{"dog": 1, "person": 1}, {"tvmonitor": -1, "aeroplane": 1}, {"cat": -1}]
    assert describe(config).counts == {"pretrain": 2, "train": 2, "holdout": None, "test": 1}
    assert len(open_source(DataConfig(source="voc07", root=tmp_path, holdout=0.5), "holdout")) == 1

    unknown = "<annotation><object><name>yeti</name></object></annotation>"
    (root / "Annotations" / "000003.xml").write_text(unknown)
    with pytest.raises(DataError, match=r"000003\.xml.*yeti"):
        open_source(config, "test")


# Decoding.


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_decoding_of_every_mode(tmp_path: Path) -> None:
    gray = noise(6, 9)
    expected = np.repeat(gray[..., None], 3, axis=2)
    picture = Image.fromarray(gray)
    assert np.array_equal(decode(save(picture, tmp_path / "gray.png")), expected)
    wide = Image.fromarray(gray.astype(np.uint16) * 257)
    assert np.array_equal(decode(save(wide, tmp_path / "sixteen.png")), expected)
    assert np.array_equal(decode(save(wide, tmp_path / "sixteen.tiff")), expected)
    assert np.array_equal(decode(save(picture.convert("P"), tmp_path / "palette.png")), expected)
    bits = decode(save(picture.convert("1"), tmp_path / "one.png"))
    assert set(np.unique(bits)) <= {0, 255}

    # CMYK: no ink is white, all black ink is black, full cyan takes the red away.
    inks = np.zeros((1, 3, 4), np.uint8)
    inks[0, 1, 3] = inks[0, 2, 0] = 255
    cmyk = decode(save(Image.fromarray(inks, mode="CMYK"), tmp_path / "cmyk.tiff"))
    assert cmyk.tolist() == [[[255, 255, 255], [0, 0, 0], [0, 255, 255]]]
    blocks = Image.fromarray(np.repeat(np.repeat(inks, 16, 0), 16, 1), mode="CMYK")
    jpeg = decode(save(blocks, tmp_path / "cmyk.jpg", quality=100))
    assert np.abs(jpeg[8, [8, 24, 40]].astype(int) - cmyk[0]).max() < 12

    # Transparent pixels turn white, half transparent ones half white, opaque ones stay.
    layers = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 128]]], np.uint8)
    clear = decode(save(Image.fromarray(layers), tmp_path / "rgba.png"))
    assert clear[0, :2].tolist() == [[255, 255, 255], [10, 20, 30]]
    assert clear[0, 2].tolist() == pytest.approx([127] * 3, abs=1)
    for name in ("gray.png", "sixteen.png", "palette.png", "cmyk.jpg", "rgba.png"):
        result = decode(tmp_path / name)
        assert (result.dtype, result.ndim, result.flags.writeable) == (np.uint8, 3, True)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (3, lambda a: a[::-1, ::-1]),
        (6, lambda a: np.rot90(a, -1)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_exif_orientation_is_applied(
    orientation: int, turn: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    pixels = noise(6, 9, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(Image.fromarray(pixels), tmp_path / "turned.png", exif=exif)
    assert np.array_equal(decode(path), turn(pixels))
    assert stored_size(path) == turn(pixels).shape[:2]


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "absent", "float"])
def test_a_broken_file_is_named(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a" / ("broken.tif" if kind == "float" else "broken.jpg")
    write_image(path, size=(200, 200))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "float":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(path)
    else:
        path.unlink()
    with pytest.raises(DataError, match=str(path)):
        decode(path)


def test_reduced_decoding_keeps_the_statistics(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:400, 0:600]
    smooth = np.stack([rows / 400, columns / 600, (rows + columns) / 1000], axis=2)
    path = save(Image.fromarray((smooth * 255).astype(np.uint8)), tmp_path / "big.jpg", quality=95)
    small = decode(path, at_least=128)
    assert 128 <= min(small.shape[:2]) < 400
    assert small.mean((0, 1)) / 255 == pytest.approx(smooth.mean((0, 1)), abs=0.01)


# Sources as objects.


def test_select_keeps_images_labels_and_ids_together() -> None:
    source = open_source(DataConfig(), "train")
    part = source.select(torch.tensor([7, 3, 7]))
    assert as_list(part) == [as_list(source)[i] for i in (7, 3, 7)]
    assert part.labels.tolist() == source.labels[[7, 3, 7]].tolist()
    assert np.array_equal(part.images[1], source.images[3])
    assert part.images.array is not None
    assert np.array_equal(part.images.array[2], source.images[7])
    assert np.array_equal(part.select([1]).images[0], source.images[3])
    assert len(source.select([])) == 0
    with pytest.raises(IndexError, match=r"1197 is outside digits/train of 1,197"):
        source.select([1197])
    with pytest.raises(IndexError):
        source.select([-1])
    with pytest.raises(TypeError, match="nonzero"):
        source.select(source.labels == 3)
    with pytest.raises(IndexError):
        source.images[1197]


def test_array_images_join_parts_without_copying_them() -> None:
    first, second = noise(4, 5, 6, 3), noise(3, 5, 6, 3, seed=1)
    joined = ArrayImages(first, second)
    assert np.array_equal(joined.array, np.concatenate([first, second]))
    assert np.array_equal(joined[-1], second[-1])
    assert np.array_equal(joined.select(np.array([5, 0])).array, np.stack([second[1], first[0]]))
    assert ArrayImages(first).array is first
    copy = joined[0]
    copy[:] = 0
    assert first[0].any()
    with pytest.raises(DataError, match="one size"):
        ArrayImages(first, noise(2, 5, 5, 3))


def test_fingerprints_follow_files_and_not_their_folder(tmp_path: Path) -> None:
    prints = []
    for name in ("one", "two"):
        write_tree(tmp_path / name, {"a": 4, "b": 4})
        for path in sorted((tmp_path / name).rglob("*.png")):
            os.utime(path, (1_000_000, 1_000_000))
        prints.append(open_source(DataConfig(source="folder", root=tmp_path / name), "pretrain").fingerprint())
    assert prints[0] == prints[1]
    config = DataConfig(source="folder", root=tmp_path / "one")
    os.utime(tmp_path / "one" / "a" / "000.png", (2_000_000, 2_000_000))
    touched = open_source(config, "pretrain").fingerprint()
    write_image(tmp_path / "one" / "b" / "new.png")
    assert len({prints[0], touched, open_source(config, "pretrain").fingerprint()}) == 3


@pytest.mark.parametrize(
    ("name", "counts", "classes", "size"),
    [
        ("digits", (1197, 1197, 240, 360), 10, 8),
        ("cifar10", (45_000, 45_000, 5_000, 10_000), 10, 32),
        ("cifar20", (45_000, 45_000, 5_000, 10_000), 20, 32),
        ("stl10", (104_500, 4_500, 500, 8_000), 10, 96),
        ("fashion_mnist", (54_000, 54_000, 6_000, 10_000), 10, 28),
    ],
)
def test_sets_that_never_change_are_described_without_them(
    name: str, counts: tuple[int, ...], classes: int, size: int, tmp_path: Path
) -> None:
    facts = describe(DataConfig(source=name, root=tmp_path / "nothing"))
    assert tuple(facts.counts[split] for split in ("pretrain", "train", "holdout", "test")) == counts
    assert (facts.num_classes, facts.image_size) == (classes, size)
    limited = describe(DataConfig(source=name, limit=100)).counts
    assert (limited["pretrain"], limited["train"]) == (100, 100)


def test_description_agrees_with_what_is_opened(tmp_path: Path) -> None:
    for config in (DataConfig(holdout=0.3, limit=77), DataConfig(source="folder", root=tmp_path, limit=5)):
        write_tree(tmp_path, {"a": 7, "b": 13})
        facts = describe(config)
        for split in ("pretrain", "train", "holdout"):
            source = open_source(config, split)
            assert facts.counts[split] == len(source)
            assert (facts.num_classes, facts.image_size) == (source.num_classes, source.image_size)


# Real images.


def test_real_cifar10_folder() -> None:
    config = real("cifar10-jpeg")
    train, held, test = (open_source(config, split) for split in ("train", "holdout", "test"))
    assert (len(train), len(held), len(test)) == (45_000, 5_000, 10_000)
    assert held.labels.bincount().tolist() == [500] * 10
    assert test.images.size == (32, 32)
    # 500 of its images against the published statistics of all, from which this copy differs by JPEG alone.
    published_mean, published_std = sources.CIFAR10
    assert train.mean == pytest.approx(published_mean, abs=0.015)
    assert train.std == pytest.approx(published_std, abs=0.015)
    assert isinstance(test.images, FileImages)
    assert np.array_equal(test.images[17], np.asarray(Image.open(test.images.path(17)).convert("RGB")))


def test_real_photographs_of_many_sizes() -> None:
    config = real("imagenet-sample")
    facts = describe(config)
    assert (facts.counts["pretrain"], facts.num_classes, facts.image_size) == (500, 500, 224)
    assert facts.counts["holdout"] is None  # one image a class
    source = open_source(config, "train")
    assert isinstance(source.images, FileImages)
    assert source.images.size is None
    for index in range(0, 500, 50):
        image = source.images[index]
        assert image.shape == (*stored_size(source.images.path(index)), 3)
    assert source.mean == pytest.approx(sources.IMAGENET[0], abs=0.03)
    grays = [i for i in range(500) if Image.open(source.images.path(i)).mode == "L"]
    assert len(grays) == 9
    image = source.images[grays[0]]
    assert (image[..., 0] == image[..., 1]).all()
