"""Which files of a tree are taken for images: none is passed over in silence, and no walk goes on for ever."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from pipelines.sources import DataConfig, DataError, open_source
from pipelines.stored.images import FileImages, decode, stored_size
from pipelines.stored.listing import class_names, image_names, left_out
from tests.pipelines.stored_sets import write_tree


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path, {"a/below": 2, "b": 1})
    scandir = os.scandir

    def refused(path: Any) -> Any:  # as for another user than root, who may read everything
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    message = rf"cannot list the folder {tmp_path / 'a' / 'below'}: Permission denied"
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(source="folder", root=tmp_path), "train")
    with pytest.raises(DataError, match=message):
        left_out(tmp_path, ("a", "b"))


def test_links_that_lead_back_up_are_left_out(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    write_tree(tree, {"a": 2, "b/below": 1})
    write_tree(tmp_path / "elsewhere", {"c": 1})
    (tree / "again").symlink_to(tree)
    (tree / "a" / "up").symlink_to(tmp_path)
    (tree / "b" / "below" / "here").symlink_to(tree / "b")
    (tree / "b" / "far").symlink_to(tmp_path / "elsewhere")
    (tree / "b" / "other").symlink_to(tree / "a")  # twice, but without end only by a/up
    assert class_names(tree) == ("a", "b")
    assert image_names(tree, "a") == ["a/000.png", "a/001.png"]
    inside = ["b/below/000.png", "b/far/c/000.png", "b/other/000.png", "b/other/001.png"]
    assert image_names(tree, "b") == inside
    assert len(image_names(tree, "")) == 6
    loops = sorted(
        path for path, reason in left_out(tree, ("a", "b")) if reason == "a link to a folder that it lies in"
    )
    places = ("a/up", "again", "b/below/here", "b/other/up")
    assert loops == [str(tree / place) for place in places]


def test_a_class_folder_has_a_name_in_utf8(tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 1})
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    with pytest.raises(DataError, match=r"the class folder b'\\xff\\xfe' is not UTF-8; rename the folder"):
        open_source(DataConfig(source="folder", root=tmp_path), "train")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_regular_file_is_not_opened(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    else:
        path.symlink_to("/dev/zero")
    for read in (lambda: FileImages(tmp_path, ["x.png"]).read(0), lambda: decode(path), lambda: stored_size(path)):
        with pytest.raises(DataError, match="not a regular file"):
            read()
