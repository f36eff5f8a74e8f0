"""The FFCV loader's own: reading without a memory map, order by the disk, and FFCV's decoder in place of ours."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import ffcv
from pipelines.config import LoaderConfig
from pipelines.jpeg.decoder import JpegError
from pipelines.packed.conversion import convert
from pipelines.packed.encode import Options
from pipelines.packed.gathering import gather
from pipelines.sources import DataConfig, DataError, Source, open_source
from pipelines.views import ViewsConfig
from tests.pipelines.stored_sets import write_photos

CROPS = ViewsConfig(plan="simclr").resolve()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    photos, target = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("packed")
    write_photos(photos, 42)
    source = gather(DataConfig(source="folder", root=photos), None)[0]
    convert(source, target, Options(write_mode="proportion", raw_share=0.3), workers=0)
    return target


def opened(root: Path, **changes: Any) -> Source:
    return open_source(DataConfig(source="folder", root=root, holdout=0, **changes), "pretrain")


def loader(source: Source, **changes: Any) -> ffcv.FFCVLoader:
    settings = {name: changes.pop(name) for name in list(changes) if name not in LoaderConfig.model_fields}
    settings = {"size": 32, "batch_size": 10, "seed": 1, "device": torch.device("cpu")} | settings
    return ffcv.FFCVLoader(source, CROPS, config=LoaderConfig(loader="ffcv", workers=2, **changes), **settings)


def crops(source: Source, **changes: Any) -> torch.Tensor:
    made = loader(source, **changes)
    try:
        return next(made.crops(0, [torch.arange(42)])).crops
    finally:
        made.close()


def test_without_a_memory_map_the_same_and_nothing_stays_mapped(packed: Path) -> None:
    def mapped() -> bool:
        return str(packed / "train.beton") in Path("/proc/self/maps").read_text()

    read = opened(packed, os_cache=False)
    expected = crops(read, os_cache=False)
    assert not mapped()
    source = opened(packed, os_cache=True)
    assert torch.equal(crops(source, os_cache=True), expected)
    assert mapped()


def test_quasi_random_order_goes_by_the_place_in_the_file(packed: Path) -> None:
    source = opened(packed)
    made = loader(source, order="quasi_random")
    addresses = source.images.addresses
    assert addresses is not None
    assert torch.equal(made.order._stored, torch.from_numpy(np.argsort(addresses)))
    seen = torch.cat([batch[0].indices for batch in made.epoch(0)])
    assert torch.equal(seen, made.order.epoch(0)[:40])


def test_ffcvs_decoder_where_ours_cannot_be_built(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ffcv")
    source = opened(packed)
    expected = crops(source, scaled=False)
    monkeypatch.setattr(ffcv, "jpeg_decoder", lambda: None)
    made = loader(source, scaled=False)
    assert isinstance(made.decoder, ffcv.FFCVDecoder)
    got = next(made.crops(0, [torch.arange(42)])).crops
    # The same filter behind libjpeg's fast DCT: within what may lie between two loaders.
    assert 0 < (got.float() - expected.float()).abs().mean((2, 3, 4)).max() < 3


def test_ffcvs_decoder_refuses_damage(packed: Path) -> None:
    pytest.importorskip("ffcv")
    source = opened(packed)
    decoder = ffcv.FFCVDecoder()
    index = next(i for i in range(42) if isinstance(source.images.read(i), bytes))
    data = np.frombuffer(source.images.read(index), np.uint8)
    boxes = np.array([[[0, 0, 20, 20]]])
    out = np.empty((1, 1, 8, 8, 3), np.uint8)
    settings: dict[str, Any] = {"sizes": source.images.sizes[[index]], "scaled": False, "begin": 0, "end": 1}
    decoder.decode_crops([data], boxes, out, **settings)
    with pytest.raises(JpegError, match="FFCV's decoder refuses it"):
        decoder.decode_crops([data[: len(data) // 2].copy()], boxes, out, **settings)


def test_damage_in_the_file_is_an_error_and_never_noise(packed: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "packed"
    shutil.copytree(packed, damaged)
    table = opened(packed).images.table
    index = int(np.flatnonzero(~table.raw.astype(bool))[5])
    with open(damaged / "train.beton", "r+b") as file:
        file.seek(int(table.offset[index]) + int(table.length[index]) // 2)
        file.write(os.urandom(64).replace(b"\xff", b"\xfe") + b"\xff\xd9" + bytes(400))
    made = loader(opened(damaged))
    everything = [torch.arange(42)]

    def twenty_epochs() -> None:  # until a crop reaches down to the damage
        for epoch in range(20):
            list(made.crops(epoch, everything))

    with pytest.raises(DataError, match=rf"cannot decode image {table.index[index]} in .*train\.beton"):
        twenty_epochs()
    made.close()


def test_a_file_that_becomes_shorter_is_an_error_and_not_the_end_of_the_process(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "packed")
    made = loader(opened(tmp_path / "packed"))
    list(made.epoch(0))
    os.truncate(tmp_path / "packed" / "train.beton", 20_000)
    with pytest.raises(DataError, match=r"train\.beton was changed or replaced"):
        list(made.epoch(1))
    made.close()


def test_neither_decoder_is_a_refusal_that_says_what_is_missing(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffcv, "jpeg_decoder", lambda: None)
    monkeypatch.setattr(ffcv, "why_no_jpeg_decoder", lambda: "there is no C compiler")
    monkeypatch.setitem(__import__("sys").modules, "ffcv.libffcv", None)
    with pytest.raises(DataError, match="there is no C compiler, and FFCV's cannot be imported"):
        loader(opened(packed))
