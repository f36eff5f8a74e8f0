"""Stored images that vanish or change while a run reads them: an error that names the file, never other pixels."""

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.choice import build_loader
from pipelines.config import LoaderConfig
from pipelines.loading import Loader
from pipelines.sources import DataConfig, DataError, open_source
from pipelines.unchanged import data_fingerprint, is_other_data
from pipelines.views import View
from tests.pipelines.packing import as_packed, pack, photo, photo_tree

IMAGES, BATCH = 24, 4
PLAN = (View(crop="random_resized"),)
Fault = Callable[[Path], None]


def removed(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def overwritten(path: Path) -> None:
    """In place, by as many other bytes."""
    data = bytearray(path.read_bytes())
    with path.open("r+b") as file:
        file.write(data[::-1])


def replaced(path: Path) -> None:
    """By another file of the same size, as a copy tool does it; the file that is open stays as it was."""
    other = path.with_name(".other")
    other.write_bytes(path.read_bytes()[::-1])
    os.replace(other, path)


def longer(path: Path) -> None:
    other = path.with_name(".other")
    other.write_bytes(path.read_bytes() + b"more")
    os.replace(other, path)


FAULTS: tuple[Fault, ...] = (removed, cut_off, emptied, overwritten, replaced, longer)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataConfig]:
    folder = tmp_path_factory.mktemp("sets")
    config = photo_tree(folder / "folder", {"one": IMAGES // 2, "two": IMAGES // 2}, sides=(40, 50))
    found = {"folder": config}
    for kind in ("ffcv", "webdataset", "tfrecord"):
        pack(config, folder / kind, to=kind)
        found[kind] = as_packed(config, folder / kind)
    return found


def copy_of(config: DataConfig, folder: Path) -> tuple[DataConfig, Path]:
    """A copy of a set, and its file that will come to harm: the one with all images, or one of them."""
    assert config.root is not None
    shutil.copytree(config.root, folder)
    packed = [path for path in folder.iterdir() if path.suffix in (".beton", ".tar", ".tfrecord")]
    return as_packed(config, folder), packed[0] if packed else folder / "two/7.jpg"


def loader_of(config: DataConfig, name: str, reader: str) -> Loader:
    settings = LoaderConfig(workers=1, ahead=1, reader=reader)  # type: ignore[arg-type]
    source = open_source(config, "pretrain")
    return build_loader(
        name, source, PLAN, config=settings, size=16, batch_size=BATCH, seed=0, device=torch.device("cpu")
    )


def views(loader: Loader, epochs: int = 3) -> Iterator[Tensor]:
    for [batch] in chain.from_iterable(loader.epoch(epoch) for epoch in range(epochs)):
        yield batch.views


COMBINATIONS = [
    ("ffcv", "ffcv", "ours"),
    ("webdataset", "native", "ours"),
    ("tfrecord", "native", "ours"),
    ("folder", "native", "ours"),
    ("webdataset", "dali", "ours"),
    ("folder", "dali", "ours"),
    ("webdataset", "dali", "dali"),
    ("tfrecord", "dali", "dali"),
]
SLOW = [("folder", "plain", "ours"), ("webdataset", "plain", "ours"), ("ffcv", "plain", "ours")]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("kind", "name", "reader"), [*COMBINATIONS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_a_file_that_changes_in_mid_run_is_named(
    sets: dict[str, DataConfig], kind: str, name: str, reader: str, fault: Fault, tmp_path: Path
) -> None:
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    config, victim = copy_of(sets[kind], tmp_path / "set")
    calm = loader_of(sets[kind], name, reader)
    expected = list(views(calm))
    calm.close()
    # A file of its own may not have been read yet, and bytes behind its end are no other pixels.
    moments = (IMAGES // BATCH,) if kind == "folder" and fault is longer else (1, IMAGES // BATCH)
    for before in moments:  # in mid-epoch, and between two
        rough = loader_of(config, name, reader)
        whole, seen = victim.read_bytes(), 0
        with pytest.raises(DataError) as refused:  # noqa: PT012
            for made in views(rough):
                assert torch.equal(made, expected[seen]), "pixels of another image"
                seen += 1
                if seen == before:
                    fault(victim)
        rough.close()
        assert str(victim) in str(refused.value)
        assert before <= seen <= 2 * len(expected) // 3, "one more epoch at most"
        victim.write_bytes(whole)


def test_a_set_is_told_from_another_by_names_and_sizes_and_not_by_dates(
    sets: dict[str, DataConfig], tmp_path: Path
) -> None:
    told = {kind: data_fingerprint(open_source(config, "pretrain")) for kind, config in sets.items()}
    for kind, config in sets.items():
        moved, victim = copy_of(config, tmp_path / kind)
        os.utime(victim, (1, 1))
        assert data_fingerprint(open_source(moved, "pretrain")) == told[kind]
        assert not any(is_other_data(told[kind], told[other]) for other in sets)
    folder, victim = copy_of(sets["folder"], tmp_path / "changed")
    photo(44, 50, seed=99).save(victim)
    assert is_other_data(told["folder"], data_fingerprint(open_source(folder, "pretrain")))
