"""A tree of photographs, and the same packed."""

from pathlib import Path

import pytest

from pipelines.sources import DataConfig
from tests.pipelines.packing import pack, photo_tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    photo_tree(tmp_path / "tree", {"a": 5, "b": 4})
    return tmp_path / "tree"


@pytest.fixture
def packed(tree: Path, tmp_path: Path) -> Path:
    pack(DataConfig(source="folder", root=tree), tmp_path / "packed")
    return tmp_path / "packed"
