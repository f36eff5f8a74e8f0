"""DALI fed by us: pixels against torchvision, order and boxes against ours."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as T

from pipelines.dali import DaliLoader
from pipelines.sources import DataError, Source, open_source
from pipelines.stored.images import ArrayImages, decode
from pipelines.views import View
from tests.pipelines.dali_sets import TWO, WHOLE, cut_off, dali_loader, indices_of, open_folder, small_set
from tests.pipelines.stored_sets import noise, real, save, write_tree

pytest.importorskip("nvidia.dali")

Make = Callable[..., DaliLoader]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return small_set(tmp_path_factory.mktemp("small"))


@pytest.fixture
def make() -> Iterator[Make]:
    """`dali_loader`, closed in the end."""
    with ExitStack() as loaders:
        yield lambda *args, **settings: loaders.enter_context(closing(dali_loader(*args, **settings)))


def torchvision_crop(image: np.ndarray, box: list[int], size: int) -> np.ndarray:
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return T.resized_crop(tensor, *box, [size, size], antialias=True).permute(1, 2, 0).numpy()


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
                assert sorted(seen[:41]) == list(range(41))


def test_neither_shares_nor_threads_change_a_crop(small: Source, make: Make) -> None:
    loader = make(small)
    (whole,) = loader.crops(1, [torch.arange(41)])
    for sizes in ([5, 5, 2], [1, 30, 10], [41], []):
        batches = list(loader.crops(1, torch.arange(sum(sizes)).split(sizes) if sizes else []))
        assert [len(batch.indices) for batch in batches] == sizes
        for batch in batches:
            assert torch.equal(batch.crops, whole.crops[:, batch.indices])
    (threads,) = make(small, workers=3, ahead=1).crops(1, [torch.arange(41)])
    assert torch.equal(threads.crops, whole.crops)


def test_an_epoch_begins_anywhere_and_ends_anywhere(small: Source, make: Make) -> None:
    loader = make(small, batch_size=3, ahead=2)
    whole = [step[0] for step in loader.epoch(2)]
    threads = threading.active_count()
    for first in (5, 12, 0):
        steps = loader.epoch(2, first)
        assert torch.equal(next(steps)[0].views, whole[first].views)
        steps.close()
    patience = time.monotonic() + 10  # a thread that was told to end takes a moment
    while threading.active_count() > threads and time.monotonic() < patience:
        time.sleep(0.01)
    assert threading.active_count() <= threads
    assert list(loader.epoch(2, 13)) == []
    # Two that are read in turns: an evaluation in mid-epoch.
    for a, b in zip(loader.epoch(2), loader.epoch(2), strict=True):
        assert torch.equal(a[0].views, b[0].views)


def test_batches_stay_as_they_are(small: Source, make: Make) -> None:
    kept = [(batch.crops, batch.crops.clone()) for batch in make(small).crops(0, torch.arange(41).split(2))]
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


@pytest.mark.gpu
def test_crops_decoded_on_a_gpu_stay_there(make: Make) -> None:
    source = open_source(real("imagenet-sample").model_copy(update={"holdout": 0}), "pretrain")
    shares = torch.arange(0, len(source), 5).split(20)
    expected = list(make(source, size=224).crops(0, shares))
    batches = list(make(source, size=224, device=torch.device("cuda")).crops(0, shares))
    for a, b in zip(batches, expected, strict=True):
        assert a.crops.device.type == "cuda"
        assert (a.crops.cpu().float() - b.crops.float()).abs().mean((2, 3, 4)).max() < 2, "nvJPEG's rounding"
