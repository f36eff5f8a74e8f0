"""`python -m tools.convert`: what is refused before anything is written, and what its options do."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines.packed.journal import Journal
from pipelines.sources import DataConfig, open_source
from tests.pipelines.packing import photo_tree, run


def test_commands_that_make_no_sense_are_refused(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for arguments, message in (
        ((tree,), "name the folder to fill"),
        ((tree, tmp_path / "out"), "say what to convert to"),
        ((tree, tmp_path / "full", "--to", "ffcv"), "is not empty (thesis.tex)"),
        ((tree, tmp_path / "out", "--to", "tfrecord", "--write-mode", "proportion"), "is for --to ffcv"),
        ((tree, tmp_path / "out", "--to", "ffcv", "--shuffle", 1), "--shuffle is for shards"),
        ((tree, tmp_path / "out", "--to", "tfrecord", "--shuffle", "yes"), "expected none, or a seed"),
        ((tree, tmp_path / "out", "--to", "ffcv", "--parts", "val"), "expected train, test"),
        ((tree, tmp_path / "out", "--to", "ffcv", "--parts", "test"), "has no test images"),
        ((tree, tmp_path / "out", "--to", "ffcv", "--root", tree), "--root is for a source given by name"),
        ((tree, tmp_path / "out", "data.limit=3", "--to", "ffcv"), "set in its recipe"),
        (("cifar11", tmp_path / "out", "--to", "ffcv"), "neither a folder nor a data source"),
        (("memory://no", tmp_path / "out", "--to", "ffcv"), "no packed set there"),
        ((tree, "--verify"), "no manifest.json of a finished conversion"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists()


def test_a_destination_inside_the_source_is_refused(tree: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tree)
    before = sorted(tmp_path.rglob("*"))
    inside = ((tree, tree), (tree, tree / "packed"), (tree, tmp_path / "link" / "a" / "b"), (packed, packed / "again"))
    for source, destination in inside:
        result = run(source, destination, "--to", "ffcv")
        assert result.exit_code == 2
        assert f"the destination {destination} is the source's folder {source}, or inside of it" in result.output
    assert sorted(tmp_path.rglob("*")) == before
    photo_tree(tmp_path / "data" / "imagenet" / "train", {"n01": 2})
    command = "imagenet", "--root", tmp_path / "data", "--to", "ffcv"
    result = run(*command[:1], tmp_path / "data" / "imagenet" / "train" / "packed", *command[1:])
    assert "is the source's folder" in result.output
    assert run(*command[:1], tmp_path / "data" / "packed", *command[1:]).exit_code == 0  # beside the images


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    tree = tmp_path / "[bold]x[/red] :smile:"
    photo_tree(tree, {"a": 2})
    (tree / "a" / "[blue].jpg").write_bytes(b"")
    result = run(tree, tmp_path / "[/packed]", "--to", "ffcv", "--verify")
    assert result.exit_code == 1
    assert f"{tree}/a/[blue].jpg" in result.output
    assert f"{tmp_path}/[/packed]: verified" in result.output


def test_what_cannot_fit_is_refused(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000))
    result = run(tree, tmp_path / "packed", "--to", "ffcv")
    assert result.exit_code == 2
    assert "GB are free at" in result.output
    assert not list((tmp_path / "packed").glob("*.partial"))


def test_one_conversion_at_a_time(tree: Path, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "packed", {})
    result = run(tree, tmp_path / "packed", "--to", "ffcv")
    assert "another process is converting" in result.output
    journal.close()


def test_shards_are_shuffled_by_their_seed(tree: Path, tmp_path: Path) -> None:
    order = {}
    for shuffle in ("0", "1", "none"):
        run(tree, tmp_path / shuffle, "--to", "webdataset", "--shuffle", shuffle)
        config = DataConfig(source="folder", root=tmp_path / shuffle, holdout=0.0)
        order[shuffle] = np.argsort(open_source(config, "train").images.addresses).tolist()
    assert order["none"] == list(range(9))
    assert order["0"] == np.random.RandomState(0).permutation(9).tolist()
    assert order["1"] == np.random.RandomState(1).permutation(9).tolist()
