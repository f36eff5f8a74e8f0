"""Splits, configuration and sources as objects; and real images where they are present."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pipelines import sources
from pipelines.sources import DataConfig, DataError, describe, open_source
from pipelines.stored.images import ArrayImages, FileImages, stored_size
from tests.pipelines.stored_sets import as_list, noise, real, write_image, write_tree

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
