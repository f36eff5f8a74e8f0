"""A packed set in place of its original: the same splits, labels, positions, classes, statistics and images."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from pipelines.packed.manifest import read_manifest
from pipelines.sources import DataConfig, DataError, describe, open_source
from pipelines.stored import arrays
from tests.pipelines.packing import FORMATS, as_packed, assert_alike, pack, photo, photo_tree
from tests.pipelines.stored_sets import noise, real, write_tree


@pytest.mark.parametrize("to", FORMATS)
def test_digits(to: str, tmp_path: Path) -> None:
    config = DataConfig(limit=300, holdout_seed=3)
    manifest = pack(DataConfig(), tmp_path, to=to, write_mode="raw")
    assert {name: part.count for name, part in manifest.parts.items()} == {"train": 1_437, "test": 360}
    assert_alike(config, as_packed(config, tmp_path))


def test_a_folder_of_photographs_and_its_figures(tmp_path: Path) -> None:
    config = photo_tree(tmp_path / "tree" / "train", {"b": 6, "a": 3})
    photo_tree(tmp_path / "tree" / "val", {"a": 2, "b": 1})
    config = config.model_copy(update={"root": tmp_path / "tree", "holdout": 0.3})
    for to in FORMATS:
        manifest = pack(config, tmp_path / to, to=to)
        assert_alike(config, as_packed(config, tmp_path / to))
    part = manifest.parts["train"]
    images = [open_source(config.model_copy(update={"holdout": 0.0}), "train").images[row] for row in range(9)]
    assert (part.kept, part.encoded, part.raw, part.skipped) == (9, 0, 0, 0)
    assert (part.height.min, part.width.max) == (30, 70)
    assert part.height.median == np.median([len(image) for image in images])
    means = np.mean([image.reshape(-1, 3).mean(0) / 255 for image in images], axis=0)
    squares = np.mean([((image.reshape(-1, 3) / 255) ** 2).mean(0) for image in images], axis=0)
    assert part.mean == pytest.approx(means)
    assert part.std == pytest.approx(np.sqrt(squares - means**2))
    assert part.class_counts == (3, 6)


def test_unlabelled_images_and_one_size(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    for place in range(4):
        photo(30, 40, place).save(tmp_path / "tree" / f"{place}.png")
    config = DataConfig(source="folder", root=tmp_path / "tree")
    pack(config, tmp_path / "packed", write_mode="raw")
    assert_alike(config, as_packed(config, tmp_path / "packed"))
    assert open_source(as_packed(config, tmp_path / "packed"), "pretrain").images.size == (30, 40)


def test_stl10_is_packed_with_its_unlabelled_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"train": 20, "unlabeled": 30, "test": 10}
    monkeypatch.setattr(arrays, "STL10_COUNTS", counts)
    folder = tmp_path / torchvision.datasets.STL10.base_folder
    folder.mkdir()
    for place, (name, count) in enumerate(counts.items()):
        noise(count, 3, 96, 96, seed=place).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f"{name}_y.bin")
    config = DataConfig(source="stl10", root=tmp_path, holdout=0.5)
    pack(config, tmp_path / "packed", write_mode="raw")
    packed = as_packed(config, tmp_path / "packed")
    for split, count in (("pretrain", 40), ("train", 10), ("holdout", 10), ("test", 10)):
        ours, original = (open_source(c, split) for c in (packed, config))  # type: ignore[arg-type]
        assert len(ours) == len(original) == describe(packed).counts[split] == count  # type: ignore[index]
        assert torch.equal(ours.labels, original.labels)
        assert torch.equal(ours.ids, original.ids)
        assert all(np.array_equal(ours.images[row], original.images[row]) for row in range(0, count, 5))


def test_voc07_keeps_its_rows_of_labels(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for place, difficult in enumerate((0, 1, 0, 1)):
        photo(30, 40, place).save(root / "JPEGImages" / f"{place}.jpg")
        body = f"<object><name>dog</name><difficult>{difficult}</difficult></object><object><name>cat</name></object>"
        (root / "Annotations" / f"{place}.xml").write_text(f"<annotation>{body}</annotation>")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("0\n1\n2\n")
    (root / "ImageSets" / "Main" / "test.txt").write_text("3\n")
    config = DataConfig(source="voc07", root=tmp_path, holdout=0.0)
    for to in FORMATS:
        pack(config, tmp_path / to, to=to)
        assert_alike(config, as_packed(config, tmp_path / to))
    assert open_source(as_packed(config, tmp_path / to), "test").labels.sum() == 0  # a cat and a difficult dog


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for part, count in (("train", 4), ("val", 2)):
        write_tree(tmp_path / "imagenet" / part, {"n03": count + 1, "n01": count, "n02": count}, suffix=".JPEG")
    (tmp_path / "mine.txt").write_text("n03\nn01\n")
    (tmp_path / "imagenet50.txt").write_text("n02\nn03\n")
    return tmp_path


def test_all_of_imagenet_serves_its_subsets(imagenet: Path) -> None:
    whole = DataConfig(source="imagenet", root=imagenet, holdout=0.25)
    pack(whole, imagenet / "packed", to="webdataset")
    shutil.copy(imagenet / "imagenet50.txt", imagenet / "packed")
    for config in (
        whole,
        whole.model_copy(update={"class_list": imagenet / "mine.txt"}),
        whole.model_copy(update={"source": "imagenet50"}),
    ):
        assert_alike(config, as_packed(config, imagenet / "packed"))
    (imagenet / "mine.txt").write_text("n03\nn99\n")
    with pytest.raises(DataError, match="no images of 1 of 2 classes: n99"):
        open_source(
            as_packed(whole, imagenet / "packed").model_copy(update={"class_list": imagenet / "mine.txt"}), "train"
        )


def test_a_choice_of_imagenet_is_not_taken_for_all_of_it(imagenet: Path) -> None:
    config = DataConfig(source="imagenet", root=imagenet, class_list=imagenet / "mine.txt", holdout=0.25)
    pack(config, imagenet / "packed")
    packed = as_packed(config, imagenet / "packed")
    assert_alike(config, packed)
    message = r"holds only 2 classes of imagenet, those of a data\.class_list: n03, n01; set data\.class_list"
    with pytest.raises(DataError, match=message):
        open_source(packed.model_copy(update={"class_list": None}), "train")
    pack(packed, imagenet / "again", to="tfrecord")
    with pytest.raises(DataError, match=message):
        describe(as_packed(config, imagenet / "again").model_copy(update={"class_list": None}))
    (imagenet / "packed" / "imagenet50.txt").write_text("n01\n")
    (imagenet / "imagenet50.txt").write_text("n01\n")
    subset = DataConfig(source="imagenet50", root=imagenet)
    assert_alike(subset, as_packed(subset, imagenet / "packed"))


def test_positions_stay_where_images_were_left_out(imagenet: Path) -> None:
    bad = sorted((imagenet / "imagenet" / "train" / "n02").iterdir())[1]
    whole = DataConfig(source="imagenet", root=imagenet, holdout=0.0)
    subset = whole.model_copy(update={"class_list": imagenet / "mine.txt"})
    (imagenet / "mine.txt").write_text("n02\nn03\n")
    originals = [open_source(config, "train") for config in (whole, subset)]
    bad.write_bytes(b"")
    assert pack(whole, imagenet / "packed").parts["train"].skipped == 1
    for config, original in zip((whole, subset), originals, strict=True):
        ours = open_source(as_packed(config, imagenet / "packed"), "train")
        left = [row for row in range(len(original)) if original.images.path(row) != bad]  # type: ignore[attr-defined]
        assert len(left) == len(original) - 1
        assert torch.equal(ours.ids, original.ids[left])
        assert torch.equal(ours.labels, original.labels[left])


def test_a_packed_set_is_packed_again(tmp_path: Path) -> None:
    config = photo_tree(tmp_path / "tree", {"a": 5, "b": 4})
    pack(config, tmp_path / "tars", to="webdataset")
    pack(as_packed(config, tmp_path / "tars"), tmp_path / "beton", to="ffcv")
    assert_alike(config, as_packed(config, tmp_path / "beton"))
    pack(as_packed(config, tmp_path / "beton"), tmp_path / "records", to="tfrecord")
    assert_alike(config, as_packed(config, tmp_path / "records"))


def test_a_set_of_another_source_is_refused(tmp_path: Path) -> None:
    config = photo_tree(tmp_path / "tree", {"a": 2, "b": 2})
    pack(config, tmp_path / "packed")
    with pytest.raises(DataError, match=r"packed from the source 'folder'.*'cifar10'; set data\.source=folder"):
        open_source(DataConfig(source="cifar10", root=tmp_path / "packed"), "train")
    with pytest.raises(DataError, match=r"packed without its test images"):
        open_source(as_packed(config, tmp_path / "packed"), "test")


def test_manifests_are_read_with_suspicion(tmp_path: Path) -> None:
    config = photo_tree(tmp_path / "tree", {"a": 2, "b": 2})
    manifest = pack(config, tmp_path / "packed")
    path, again = tmp_path / "packed" / "manifest.json", as_packed(config, tmp_path / "packed")
    text = path.read_text()
    assert read_manifest(str(tmp_path / "packed")) == manifest
    path.write_text(json.dumps(json.loads(text), indent=4, sort_keys=True))  # another layout is no other content
    assert read_manifest(str(tmp_path / "packed")) == manifest
    for old, new, message in (
        ("train.beton", "../tree/a/0.jpg", r"name: String should match"),
        ('"version": 1', '"version": 2', r"version: Input should be 1"),
        ('"count": 4', '"count": 5', r"its checksum is not that of its content"),
        ('"checksum": "', '"checksum": "0', r"its checksum is not that of its content"),
        ("}", "", r"not a manifest"),
        ("{", "[" * 100_000, r"not a manifest"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(DataError, match=message):
            open_source(again, "train")
    path.write_text(json.dumps({key: value for key, value in json.loads(text).items() if key != "checksum"}))
    with pytest.raises(DataError, match="it has no checksum"):
        open_source(again, "train")
    # A manifest of something else, among images.
    (tmp_path / "tree" / "manifest.json").write_text('{"name": "an app"}')
    assert len(open_source(config, "train")) == 4


def test_real_photographs(tmp_path: Path) -> None:
    everything = real("imagenet-sample")
    assert everything.root is not None
    for path in sorted(everything.root.glob("*/*"))[::20]:
        (tmp_path / "tree" / path.parent.name).mkdir(parents=True)
        (tmp_path / "tree" / path.parent.name / path.name).symlink_to(path.absolute())
    config = DataConfig(source="folder", root=tmp_path / "tree", holdout=0.0)
    original = open_source(config, "train")
    manifest = pack(config, tmp_path / "packed", max_side=400)
    assert_alike(config, as_packed(config, tmp_path / "packed"), pixels=False)
    images, kept = open_source(as_packed(config, tmp_path / "packed"), "train").images, 0
    for row in range(len(original)):
        before = original.images[row]
        if max(before.shape[:2]) <= 400 and Image.open(original.images.path(row)).mode == "RGB":  # type: ignore[attr-defined]
            assert bytes(images.read(row)) == original.images.read(row)
            kept += 1
        else:
            assert max(images[row].shape[:2]) == 400
            size = images[row].shape[1::-1]
            file = io.BytesIO()
            Image.fromarray(before).resize(size, Image.Resampling.BICUBIC).save(file, format="JPEG", quality=90)
            assert bytes(images.read(row)) == file.getvalue()
    assert manifest.parts["train"].kept == kept > 0
