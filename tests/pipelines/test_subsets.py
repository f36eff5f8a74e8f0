"""Which images carry labels: exact counts, determinism, and index files that refuse what they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.sources import ArrayImages, DataConfig, DataError, Source, open_source
from pipelines.subsets import label_subset, load_subset, save_subset, stratified_draw


def source_of(labels: list[int] | np.ndarray, classes: int | None = None) -> Source:
    """Labels as given, and images that all differ."""
    count = len(labels)
    pixels = np.zeros((count, 2, 2, 3), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    names = tuple(f"class{i}" for i in range(classes or max(labels) + 1))
    numbers = torch.as_tensor(np.asarray(labels))
    third = (0.5, 0.5, 0.5)
    return Source("made", "train", ArrayImages(pixels), numbers, torch.arange(count), names, 2, third, third)


UNEVEN = np.repeat(np.arange(4), [700, 200, 90, 10])


def test_percentages_are_shared_out_by_largest_remainder() -> None:
    source = source_of(np.random.default_rng(0).permutation(UNEVEN))
    for budget, counts in {
        "10%": [70, 20, 9, 1],
        "5%": [35, 10, 4, 1],  # 35, 10, 4.5, 0.5: the last has to give one, so 4.5 is rounded down
        "1%": [7, 1, 1, 1],  # 7, 2, 0.9, 0.1: the last two have to give one each
        "0.1%": [1, 1, 1, 1],  # fewer images than classes: one each
        "33.3%": [233, 67, 30, 3],  # 233.1, 66.6, 29.97, 3.33
        "100%": [700, 200, 90, 10],
    }.items():
        chosen = label_subset(source, budget, seed=1)
        assert chosen.dtype == torch.int64
        assert len(set(chosen.tolist())) == len(chosen)
        assert source.labels[chosen].bincount(minlength=4).tolist() == counts, budget


def test_percentages_of_even_classes_are_exact() -> None:
    source = open_source(DataConfig(), "train")
    chosen = label_subset(source, "10%")
    assert len(chosen) == 120
    exact = source.labels.bincount() / 10
    assert (source.labels[chosen].bincount() - exact).abs().max() < 1


def test_per_class_budgets_are_exact_and_nested() -> None:
    source = source_of(np.random.default_rng(0).permutation(UNEVEN))
    smaller = None
    for each in (1, 4, 10):
        chosen = set(label_subset(source, f"{each}-per-class", seed=5).tolist())
        assert source.labels[sorted(chosen)].bincount().tolist() == [each] * 4
        assert smaller is None or smaller < chosen
        smaller = chosen


def test_the_seed_decides() -> None:
    source = open_source(DataConfig(), "train")
    assert label_subset(source, "10%", 3).tolist() == label_subset(source, "10%", 3).tolist()
    assert label_subset(source, "10%", 3).tolist() != label_subset(source, "10%", 4).tolist()
    assert label_subset(source, "all").tolist() == list(range(1197))


def test_draws_are_fixed_for_good() -> None:
    """Published subsets must not move with the version of any library."""
    assert stratified_draw(np.arange(40) % 4, 8, seed=0).tolist() == [4, 10, 11, 15, 20, 22, 25, 29]


def test_every_image_is_equally_likely() -> None:
    labels = np.repeat(np.arange(2), [30, 10])
    drawn = np.zeros(40)
    for seed in range(600):
        drawn[stratified_draw(labels, 8, seed)] += 1
    assert drawn[:30].sum() == 6 * 600
    # 6 of 30 and 2 of 10: each image 120 times, standard deviation 9.8
    assert np.abs(drawn - 120).max() < 45


@pytest.mark.parametrize("budget", ["", "ten", "10", "-1%", "0%", "101%", "3 per class", "0-per-class"])
def test_other_budgets_are_refused(budget: str) -> None:
    with pytest.raises(DataError, match="label budget"):
        label_subset(source_of(UNEVEN), budget)


def test_too_many_a_class_names_the_classes() -> None:
    with pytest.raises(DataError, match=r"'class2' \(90\), 'class3' \(10\)"):
        label_subset(source_of(UNEVEN), "100-per-class")
    with pytest.raises(DataError, match=r"'class4' \(0\)"):
        label_subset(source_of(UNEVEN, classes=5), "1-per-class")
    with pytest.raises(DataError, match=r"and 2 more classes"):
        label_subset(source_of(list(range(7))), "2-per-class")


def test_sources_without_one_label_an_image_are_refused() -> None:
    with pytest.raises(DataError, match="2 of 4 images have no label"):
        label_subset(source_of([0, -1, 1, -1]), "50%")
    several = replace(source_of([0, 1, 2]), labels=torch.zeros(3, 3))
    with pytest.raises(DataError, match="several labels"):
        label_subset(several, "1-per-class")
    assert len(label_subset(several, "all")) == 3


# Index files.


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Source, torch.Tensor]:
    source = open_source(DataConfig(), "train")
    chosen = label_subset(source, "10%", seed=2)
    path = tmp_path / "subsets" / "digits-10.json"
    save_subset(path, source, chosen, budget="10%", seed=2)
    return path, source, chosen


def test_a_saved_subset_comes_back(saved: tuple[Path, Source, torch.Tensor]) -> None:
    path, source, chosen = saved
    assert torch.equal(load_subset(path, source), chosen)
    record = json.loads(path.read_text())
    assert (record["source"], record["split"], record["budget"]) == ("digits", "train", "10%")
    assert record["ids"] == source.ids[chosen].tolist()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_saved_subset_survives_another_holdout(saved: tuple[Path, Source, torch.Tensor]) -> None:
    path, source, chosen = saved
    larger = open_source(DataConfig(holdout=0.0), "train")
    positions = load_subset(path, larger)
    assert torch.equal(larger.ids[positions], source.ids[chosen])
    with pytest.raises(DataError, match=r"does not hold.*data\.holdout"):
        load_subset(path, open_source(DataConfig(holdout_seed=9), "train"))


def test_a_saved_subset_refuses_what_it_does_not_fit(saved: tuple[Path, Source, torch.Tensor]) -> None:
    path, source, _ = saved
    with pytest.raises(DataError, match="drawn from digits/train, not from digits/holdout"):
        load_subset(path, open_source(DataConfig(), "holdout"))
    with pytest.raises(DataError, match="drawn from digits/train, not from cifar10/train"):
        load_subset(path, replace(source, name="cifar10"))
    with pytest.raises(DataError, match="not those it was drawn from"):
        load_subset(path, replace(source, labels=(source.labels + 1) % 10))
    with pytest.raises(DataError, match="does not hold"):
        load_subset(path, source.select([]))
    no_ids = '{"source": "digits", "split": "train", "content": "", "ids": "x"}'
    for text in ("{", "[]", '{"source": "digits"}', no_ids):
        path.write_text(text)
        with pytest.raises(DataError, match="cannot read the label subset"):
            load_subset(path, source)
    with pytest.raises(DataError, match="cannot read the label subset"):
        load_subset(path.with_name("absent.json"), source)


def test_a_file_added_to_a_folder_invalidates_its_subsets(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for index in range(10):
            path = tmp_path / "images" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4, 3), index * 20, np.uint8)).save(path)
    config = DataConfig(source="folder", root=tmp_path / "images", holdout=0.0)
    source = open_source(config, "train")
    chosen = label_subset(source, "5-per-class")
    save_subset(tmp_path / "s.json", source, chosen, budget="5-per-class", seed=0)
    (tmp_path / "images" / "a" / "3.png").touch()  # dates may differ: the subset is the same elsewhere
    assert torch.equal(load_subset(tmp_path / "s.json", open_source(config, "train")), chosen)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "images" / "a" / "00.png")
    with pytest.raises(DataError, match="draw the subset again"):
        load_subset(tmp_path / "s.json", open_source(config, "train"))


# Lists of image names.


@pytest.fixture
def tree(tmp_path: Path) -> Source:
    """Two ImageNet-like classes of ten images, and a name that both have."""
    for wnid in ("n01440764", "n01443537"):
        for name in (*(f"{wnid}_{index}.JPEG" for index in range(10)), "shared.JPEG"):
            path = tmp_path / "images" / "train" / wnid / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)
    return open_source(DataConfig(source="folder", root=tmp_path / "images", holdout=0.0), "train")


def test_a_list_of_names_is_found_in_the_tree(tree: Source, tmp_path: Path) -> None:
    listed = tmp_path / "1percent.txt"
    listed.write_text("n01443537_7.JPEG\r\nn01440764_3.JPEG\r\n\r\n n01440764/shared.JPEG \r\n")
    positions = load_subset(listed, tree)
    assert positions.dtype == torch.int64
    found = [bytes(tree.images.names[i]).decode() for i in positions]  # type: ignore[attr-defined]
    assert found == ["n01443537/n01443537_7.JPEG", "n01440764/n01440764_3.JPEG", "n01440764/shared.JPEG"]
    assert tree.labels[positions].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        (
            "n01440764_3.JPEG\nn01440764_99.JPEG\nn9_1.JPEG",
            r"2 images that are not in .*: n01440764_99.JPEG, n9_1.JPEG$",
        ),
        ("n01440764_3", "1 images that are not in"),
        ("n01440764_3.JPEG\nn01440764_3.JPEG", "more than once: n01440764_3.JPEG$"),
        ("n01440764_3.JPEG\nn01440764/n01440764_3.JPEG", "more than once"),
        ("shared.JPEG", "write them as class/name"),
        ("\n".join(f"{i}.JPEG" for i in range(7)), r"names 7 images .*4\.JPEG, \.\.\.$"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tree: Source, tmp_path: Path, text: str, expected: str) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(text)
    with pytest.raises(DataError, match=expected):
        load_subset(listed, tree)


def test_lists_that_cannot_be_read_or_used_are_refused(tree: Source, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the label list"):
        load_subset(tmp_path / "absent.txt", tree)
    listed = tmp_path / "list.txt"
    listed.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read the label list"):
        load_subset(listed, tree)
    listed.write_text("0.png")
    with pytest.raises(DataError, match="digits does not keep its images in files"):
        load_subset(listed, open_source(DataConfig(), "train"))
