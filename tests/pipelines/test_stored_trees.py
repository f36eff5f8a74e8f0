"""Folders, ImageNet and its subsets, tiny-imagenet and VOC07, written as trees of files and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from pipelines import sources
from pipelines.sources import DataConfig, DataError, describe, open_source
from pipelines.stored.images import FileImages
from tests.pipelines.stored_sets import noise, write_image, write_tree


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
