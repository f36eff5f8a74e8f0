"""DALI, fed by us and reading by itself: pixels against torchvision, order and boxes against ours."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as T

from pipelines.config import LoaderConfig
from pipelines.dali import DaliLoader
from pipelines.packed.files import find_file
from pipelines.packed.images import PackedImages
from pipelines.packed.table import Table
from pipelines.packed.tar import dali_index as tar_index
from pipelines.packed.tar import pack_sample
from pipelines.packed.tfrecord import dali_index as record_index
from pipelines.packed.tfrecord import pack_record
from pipelines.sources import DataConfig, DataError, Source, open_source
from pipelines.stored.images import ArrayImages, decode
from pipelines.views import View, ViewsConfig
from tests.pipelines.stored_sets import noise, real, save, write_tree

pytest.importorskip("nvidia.dali")

CPU = torch.device("cpu")
WHOLE = (View(crop="whole"),)
TWO = ViewsConfig(plan="simclr", override={"jitter": 0, "grayscale": 0, "blur": 0, "flip": 0}).resolve()
Make = Callable[..., DaliLoader]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """42 small JPEGs in two classes."""
    root = tmp_path_factory.mktemp("small")
    write_tree(root, {"a": 20, "b": 22}, suffix=".jpg")
    return open_folder(root)


@pytest.fixture(scope="module", params=["file", "webdataset", "tfrecord"])
def stored(request: pytest.FixtureRequest, small: Source, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The same images as DALI's three readers take them."""
    if request.param == "file":
        return small
    return replace(small, images=packed(small, request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture
def make() -> Iterator[Make]:
    made = []

    def build(source: Source, plan: tuple[View, ...] = TWO, **settings: Any) -> DaliLoader:
        own = {name: settings.pop(name) for name in list(settings) if name in LoaderConfig.model_fields}
        config = LoaderConfig(loader="dali", **({"workers": 2} | own))
        made.append(
            DaliLoader(
                source, plan, **({"size": 16, "batch_size": 12, "seed": 5, "device": CPU, "config": config} | settings)
            )
        )
        return made[-1]

    yield build
    for loader in made:
        loader.close()


def open_folder(root: Path) -> Source:
    return open_source(DataConfig(source="folder", root=root, holdout=0), "pretrain")


def packed(source: Source, kind: str, folder: Path) -> PackedImages:
    """Two shards with the images in another order."""
    suffix, pack, index = (
        ("tar", pack_sample, tar_index) if kind == "webdataset" else ("tfrecord", pack_record, record_index)
    )
    rows, files = {}, []
    order = np.random.default_rng(1).permutation(len(source))
    for shard, part in enumerate(np.array_split(order, 2)):
        path, data, lines = folder / f"train-{shard:05d}.{suffix}", b"", []
        for number in part.tolist():
            image = source.images.read(number)
            height, width = source.images[number].shape[:2]
            detail: Any = "jpg" if suffix == "tar" else (height, width)
            piece, place, line = pack(number, source.labels[number].numpy(), image, detail, len(data))
            rows[number] = (number, 0, height, width, shard, place, len(image), False)
            data, lines = data + piece, [*lines, line]
        path.write_bytes(data + bytes(1024 if suffix == "tar" else 0))
        path.with_suffix(".idx").write_text(index(lines))
        files.append(find_file(path))
    columns = zip(*(rows[number] for number in sorted(rows)), strict=True)
    return PackedImages(tuple(files), Table(*(np.array(column) for column in columns)), kind)


def cut_off(path: Path) -> None:
    """Half of the pixels: the header stays whole."""
    data = path.read_bytes()
    start = data.index(b"\xff\xda")
    path.write_bytes(data[: start + (len(data) - start) // 2])


def indices_of(loader: DaliLoader, epoch: int, first_step: int = 0) -> list[list[int]]:
    return [torch.cat([m.indices for m in step]).tolist() for step in loader.epoch(epoch, first_step)]


def torchvision_crop(image: np.ndarray, box: list[int], size: int) -> np.ndarray:
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return T.resized_crop(tensor, *box, [size, size], antialias=True).permute(1, 2, 0).numpy()


# ---- fed by us -----------------------------------------------------------------------------------------


def test_photographs_against_torchvision(make: Make) -> None:
    source = open_source(real("imagenet-sample").model_copy(update={"holdout": 0}), "pretrain")
    some = torch.arange(0, len(source), 20)
    plan = (*TWO, View(crop="pad_and_crop", pad=28), View(crop="center"), View(crop="whole"))
    (batch,) = make(source, plan, size=224, batch_size=8).crops(3, [some])
    loader = make(source, plan, size=224, batch_size=8)
    assert batch.crops.shape == (5, len(some), 224, 224, 3)
    assert batch.crops.dtype == torch.uint8
    outside = 0
    for place, index in enumerate(some.tolist()):
        data = torch.frombuffer(bytearray(source.images.read(index)), dtype=torch.uint8)
        image = decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
        boxes = loader.boxes(some[place : place + 1], 3, torch.tensor([image.shape[:2]]))[:, 0].tolist()
        outside += boxes[2][0] != 0
        for view, box in enumerate(boxes):
            expected = torchvision_crop(image, box, 224)
            error = np.abs(batch.crops[view, place].numpy().astype(float) - expected).mean()
            assert error < 1, f"image {index}, view {view}: mean difference {error} of 255"
    assert outside > len(some) // 2, "boxes reach over the edge"


def test_files_that_dali_would_decode_otherwise(make: Make, tmp_path: Path) -> None:
    pixels = Image.fromarray(noise(4, 4, 3)).resize((16, 16), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = pixels.quantize(8)
    palette.info["transparency"] = 3
    folder = tmp_path / "a"
    folder.mkdir()
    save(pixels, folder / "plain.jpg")
    save(pixels, folder / "progressive.jpg", progressive=True)
    save(pixels.convert("L"), folder / "gray.jpg")
    save(pixels.convert("CMYK"), folder / "cmyk.jpg")
    save(pixels, folder / "turned.jpg", exif=turned)
    save(pixels, folder / "turned.png", exif=turned)
    save(Image.fromarray(np.asarray(pixels.convert("L")).astype(np.uint16) * 257), folder / "sixteen.png")
    save(palette, folder / "transparent.png", transparency=3)
    save(pixels.convert("RGBA"), folder / "rgba.png")
    save(pixels, folder / "named.jpg", format="PNG")
    source = open_folder(tmp_path)
    (batch,) = make(source, WHOLE, batch_size=10).crops(0, [torch.arange(10)])
    for index in range(10):
        path = source.images.path(index)
        assert np.array_equal(batch.crops[0, index], decode(path)), path.name


def test_arrays_pass_by_the_decoder(make: Make) -> None:
    pixels = noise(30, 16, 16, 3)
    source = Source(
        "noise", "pretrain", ArrayImages(pixels), torch.zeros(30), torch.arange(30), ("a",), 16, (0.5,) * 3, (0.5,) * 3
    )
    rows = torch.tensor([4, 29, 0])
    (whole,) = make(source, WHOLE).crops(0, [rows])
    assert np.array_equal(whole.crops[0], pixels[rows])
    plan = (View(crop="pad_and_crop"), View(crop="random_resized"))
    loader = make(source, plan)
    (batch,) = loader.crops(0, [rows])
    boxes = loader.boxes(rows, 0, torch.full((3, 2), 16))
    for view in range(2):
        for place, row in enumerate(rows):
            expected = torchvision_crop(pixels[row], boxes[view, place].tolist(), 16)
            assert np.abs(batch.crops[view, place].numpy().astype(float) - expected).mean() < 1


@pytest.mark.parametrize("last", ["drop", "pad"])
def test_the_order_is_that_of_all_loaders(last: str, small: Source, make: Make) -> None:
    for world_size in (1, 2, 3):
        ranks = [make(small, WHOLE, rank=r, world_size=world_size, last=last) for r in range(world_size)]
        for epoch in range(3):
            steps = [indices_of(rank, epoch) for rank in ranks]
            assert steps == [[s.tolist() for s in rank.order.shares(epoch)] for rank in ranks]
            seen = [index for batch in zip(*steps, strict=True) for part in batch for index in part]
            if last == "drop":
                assert len(set(seen)) == len(seen) == 36
            else:
                assert sorted(seen[:42]) == list(range(42))


def test_neither_shares_nor_threads_change_a_crop(small: Source, make: Make) -> None:
    loader = make(small)
    (whole,) = loader.crops(1, [torch.arange(42)])
    for sizes in ([5, 5, 2], [1, 30, 11], [42], []):
        batches = list(loader.crops(1, torch.arange(sum(sizes)).split(sizes) if sizes else []))
        assert [len(batch.indices) for batch in batches] == sizes
        for batch in batches:
            assert torch.equal(batch.crops, whole.crops[:, batch.indices])
    (threads,) = make(small, workers=3, ahead=1).crops(1, [torch.arange(42)])
    assert torch.equal(threads.crops, whole.crops)


def test_an_epoch_begins_anywhere_and_ends_anywhere(small: Source, make: Make) -> None:
    loader = make(small, batch_size=3, ahead=2)
    whole = [step[0] for step in loader.epoch(2)]
    threads = threading.active_count()
    for first in (5, 13, 0):
        steps = loader.epoch(2, first)
        assert torch.equal(next(steps)[0].views, whole[first].views)
        steps.close()
    assert threading.active_count() <= threads
    assert list(loader.epoch(2, 14)) == []
    # Two that are read in turns: an evaluation in mid-epoch.
    for a, b in zip(loader.epoch(2), loader.epoch(2), strict=True):
        assert torch.equal(a[0].views, b[0].views)


def test_batches_stay_as_they_are(small: Source, make: Make) -> None:
    kept = [(batch.crops, batch.crops.clone()) for batch in make(small).crops(0, torch.arange(42).split(2))]
    assert all(torch.equal(crops, copy) for crops, copy in kept)


def test_a_broken_image_is_named_and_the_loader_lives_on(make: Make, tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 12}, suffix=".jpg")
    loader = make(open_folder(tmp_path))
    for number in (3, 8):
        cut_off(tmp_path / "a" / f"{number:03d}.jpg")
    (tmp_path / "a" / "005.jpg").write_bytes(b"")
    good = torch.tensor([0, 1, 2])
    with pytest.raises(DataError, match=r"cannot decode the image file .*003\.jpg.*008\.jpg"):
        list(loader.crops(0, [torch.tensor([2, 3, 4, 8])]))
    for _ in range(2):
        batches = loader.crops(0, [good] * 9 + [torch.tensor([4, 5])])
        assert torch.equal(next(batches).indices, good)
        with pytest.raises(DataError, match=r"005\.jpg"):
            list(batches)
    (batch,) = loader.crops(0, [good])
    assert batch.crops.shape == (2, 3, 16, 16, 3)


@pytest.mark.parametrize("reader", ["ours", "dali"])
def test_memory_stays_flat(reader: str, make: Make, small: Source) -> None:
    loader = make(small, size=96, reader=reader)
    process, sizes = psutil.Process(), []
    for epoch in range(30):
        list(loader.epoch(epoch))
        if reader == "ours":
            steps = loader.epoch(epoch)
            next(steps)
            steps.close()
        sizes.append(process.memory_info().rss)
    # A leak of one batch an epoch would be 20 * 2 * 12 * 96 * 96 * 3 bytes, 13 MB.
    assert np.median(sizes[-5:]) - np.median(sizes[5:10]) < 6e6


def test_what_cannot_work_is_refused(small: Source, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data\.decode=mixed decodes on a GPU, but this run is on cpu"):
        make(small, decode="mixed")
    with pytest.raises(DataError, match=r"data\.reader=dali.*data\.reader=ours"):
        make(small).load_state(torch.zeros(8, dtype=torch.uint8))
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"needs NVIDIA DALI.*pip install 'twinstream\[dali\]'"):
        make(small)


# ---- DALI's own readers --------------------------------------------------------------------------------


@pytest.mark.parametrize("last", ["drop", "pad"])
def test_own_readers_give_every_image_once_an_epoch(last: str, stored: Source, make: Make) -> None:
    for world_size in (1, 2, 3):
        ranks = [make(stored, rank=r, world_size=world_size, last=last, reader="dali") for r in range(world_size)]
        orders = []
        for epoch in range(3):
            parts = [[step[0] for step in rank.epoch(epoch)] for rank in ranks]
            assert [len(part) for part in parts] == [ranks[0].order.steps] * world_size
            seen = [index for part in parts for batch in part for index in batch.indices.tolist()]
            if last == "drop":
                assert len(set(seen)) == len(seen) == 36
            else:
                assert len(seen) == 48
                assert set(seen) == set(range(42))
            orders.append(seen)
        assert orders[0] != orders[1] != orders[2]


def test_own_readers_number_the_images_as_the_source_does(stored: Source, make: Make) -> None:
    plan = (View(crop="random_resized", crop_scale=(1, 1), crop_ratio=(1, 1)),)
    square = make(stored, plan, size=8, reader="dali")
    for step in square.epoch(0):
        for index, view, label in zip(step[0].indices, step[0].views[0], step[0].labels, strict=True):
            assert label == stored.labels[index]
            # Images are 10 wide and 8 high: a central square of 8 is cut out and not resized.
            image = torch.from_numpy(stored.images[int(index)])
            mean, std = torch.tensor(stored.mean).view(3, 1, 1), torch.tensor(stored.std).view(3, 1, 1)
            pixels = ((view * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0)
            assert any(torch.equal(pixels, image[:, left : left + 8]) for left in range(3))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_own_readers_resume_exactly(stop: int, stored: Source, make: Make) -> None:
    """The state of a consumer that has `stop` of the 3 batches of epoch 1, though DALI is ahead of it."""
    loader = make(stored, reader="dali", rank=1, world_size=2)
    list(loader.epoch(0))
    steps = loader.epoch(1)
    for _ in range(stop):
        next(steps)
    state = loader.state()
    assert state is not None
    assert state.dtype == torch.uint8
    rest = [batch[0] for batch in steps] + [batch[0] for batch in loader.epoch(2)]

    other = make(stored, reader="dali", rank=1, world_size=2, workers=1)
    other.load_state(state)
    again = [batch[0] for batch in other.epoch(1, stop)] + [batch[0] for batch in other.epoch(2)]
    assert len(again) == len(rest) == 6 - stop
    for a, b in zip(again, rest, strict=True):
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.views, b.views)
    assert not torch.equal(rest[-1].views[0], rest[-1].views[1]), "views differ"


def test_own_readers_go_on_where_an_epoch_was_left(small: Source, make: Make) -> None:
    expected = indices_of(make(small, reader="dali"), 0)
    loader = make(small, reader="dali")
    steps = loader.epoch(0)
    first = [next(steps)[0].indices.tolist()]
    steps.close()
    assert first + indices_of(loader, 0, 1) == expected
    assert indices_of(loader, 0) == expected, "the beginning can always be had again"
    with pytest.raises(DataError, match=r"stands at step 0 of epoch 1 and cannot go to step 2 of epoch 1"):
        indices_of(loader, 1, 2)


def test_own_readers_refuse_the_state_of_another_run(small: Source, make: Make) -> None:
    loader = make(small, reader="dali", world_size=2)
    next(loader.epoch(0))
    state = loader.state()
    assert state is not None
    swapped = small.select([1, 0, *range(2, 42)])
    for told, source, changes in (
        ("batch size 12 (now 6)", small, {"batch_size": 6}),
        ("shard 0 (now 1)", small, {"rank": 1}),
        ("ranks 2 (now 1)", small, {"world_size": 1}),
        ("seed 5 (now 6)", small, {"seed": 6}),
        ("images 42 (now 41)", small.select(range(41)), {}),
        ("their hash", swapped, {}),
        ("crops [[0.08,", small, {"plan": (View(crop="random_resized", crop_scale=(0.2, 1)),) * 2}),
    ):
        with pytest.raises(DataError) as caught:
            make(source, **({"reader": "dali", "world_size": 2} | changes)).load_state(state)
        assert told in str(caught.value)
    with pytest.raises(DataError, match=r"no state of data\.reader=dali"):
        loader.load_state(torch.arange(50, dtype=torch.uint8))


def test_own_readers_refuse_what_they_cannot_serve(stored: Source, make: Make) -> None:
    with pytest.raises(DataError, match=r"view 0 has crop=whole; set data\.reader=ours"):
        make(stored, WHOLE, reader="dali")
    pixels = replace(stored, images=ArrayImages(noise(42, 8, 8, 3)))
    with pytest.raises(DataError, match=r"is an array in memory; set data\.reader=ours"):
        make(pixels, reader="dali")
    part = stored.select(range(30))
    if isinstance(stored.images, PackedImages):
        with pytest.raises(DataError, match=r"has 30 images, but its shards hold 42.*data\.holdout=0"):
            next(make(part, reader="dali").epoch(0))
    else:
        assert {i for step in indices_of(make(part, reader="dali", last="pad"), 0) for i in step} == set(range(30))


@pytest.mark.parametrize("padded", [False, True])
def test_why_shuffled_shards_are_padded(padded: bool, small: Source) -> None:
    """DALI's random_shuffle over two ranks without pad_last_batch shows some images twice and others never."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=6, num_threads=1, device_id=None, seed=1)
    def labels(rank: int) -> Any:
        files = [str(small.images.path(index)) for index in range(41)]
        return fn.readers.file(
            files=files,
            labels=list(range(41)),
            random_shuffle=True,
            pad_last_batch=padded,
            shard_id=rank,
            num_shards=2,
        )[1]

    seen = []
    for rank in range(2):
        pipeline = labels(rank)
        seen.append([{int(n) for _ in range(4) for n in pipeline.run()[0].as_array().flat} for epoch in range(3)])
    for epoch in range(1, 3):
        assert (seen[0][epoch] | seen[1][epoch] == set(range(41))) == padded


def test_own_readers_report_a_broken_image(make: Make, tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 12}, suffix=".jpg")
    loader = make(open_folder(tmp_path), reader="dali")
    cut_off(tmp_path / "a" / "003.jpg")
    with pytest.raises(DataError, match=r"does not say which image is broken: data\.reader=ours does"):
        list(loader.epoch(0))
