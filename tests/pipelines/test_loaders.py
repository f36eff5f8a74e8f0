"""What all loaders promise alike: the same images, boxes and pixels, for any number of ranks, from anywhere on."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from pydantic import ValidationError
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as T

from pipelines.choice import build_loader, choose
from pipelines.config import LoaderConfig
from pipelines.packed.conversion import convert
from pipelines.packed.encode import Options
from pipelines.packed.gathering import gather
from pipelines.plain_views import plain_batches
from pipelines.sources import DataConfig, DataError, Source, open_source
from pipelines.views import View, ViewsConfig, draw_boxes
from tests.pipelines.stored_sets import real, write_photos

CPU = torch.device("cpu")
KINDS = ("plain", "native", "ffcv", "dali")
ENCODED_ANEW = 10, 26  # positions of the PNG and of the photograph on its side, when packed
SIMCLR = ViewsConfig(plan="simclr").resolve()
POLICIES = ViewsConfig(plan="mvmr_randaugment").resolve()
CROPS = ViewsConfig(plan="simclr", override={"jitter": 0, "grayscale": 0, "blur": 0, "flip": 0}).resolve()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 JPEGs in two classes, one of them gray, one lying on its side; and a PNG that says it is a JPEG."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root, 42)
    return root


@pytest.fixture(scope="module")
def files(folder: Path) -> Source:
    return open_source(DataConfig(source="folder", root=folder, holdout=0), "pretrain")


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The same as a .beton with the same JPEGs; the PNG and the turned one are encoded anew."""
    target = tmp_path_factory.mktemp("packed")
    data = DataConfig(source="folder", root=folder, holdout=0)
    convert(gather(data, None)[0], target, Options("ffcv", max_side=0), workers=0)
    return open_source(data.model_copy(update={"root": target}), "pretrain")


@pytest.fixture
def make(files: Source, request: pytest.FixtureRequest) -> Iterator[Any]:
    """make(kind, **settings) -> loader, closed in the end; plain's processes are few, since they start slowly."""
    made = []

    def build(kind: str, source: Source | None = None, plan: tuple[View, ...] = CROPS, **settings: Any) -> Any:
        if kind == "dali":
            pytest.importorskip("nvidia.dali")
        if source is None:
            source = request.getfixturevalue("packed") if kind == "ffcv" else files
        own = {name: settings.pop(name) for name in list(settings) if name in LoaderConfig.model_fields}
        config = LoaderConfig(loader=kind, **({"workers": 1 if kind == "plain" else 2} | own))
        settings = {"size": 48, "batch_size": 12, "seed": 5, "device": CPU} | settings
        loader = build_loader(kind, source, plan, config=config, **settings)
        made.append(loader)
        return loader

    yield build
    for loader in made:
        loader.close()


def indices_of(loader: Any, epoch: int, first_step: int = 0) -> list[list[int]]:
    return [torch.cat([m.indices for m in step]).tolist() for step in loader.epoch(epoch, first_step)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("last", ["drop", "pad"])
def test_every_image_once_an_epoch_over_all_ranks(kind: str, last: str, make: Any) -> None:
    plan = (View(crop="whole"),)
    expected = None
    for world_size in (1, 2, 3):
        ranks = [
            make(kind, plan=plan, size=8, last=last, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        epochs = []
        for epoch in range(3):
            steps = [indices_of(rank, epoch) for rank in ranks]
            assert [len(s) for s in steps] == [3 if last == "drop" else 4] * world_size
            epochs.append([list(chain(*parts)) for parts in zip(*steps, strict=True)])
            seen = list(chain(*epochs[-1]))
            if last == "drop":
                assert len(set(seen)) == len(seen) == 36
            else:
                assert sorted(seen[:42]) == list(range(42))
                assert seen[42:] == seen[:6], "filled up with the epoch's first"
        assert epochs[0] != epochs[1]
        expected = expected or epochs
        assert epochs == expected, "the same global batches for any number of ranks"
        for rank in ranks:
            rank.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_entered_in_the_middle_goes_on_exactly(kind: str, make: Any) -> None:
    whole = list(make(kind, plan=SIMCLR).epoch(2))
    later = list(make(kind, plan=SIMCLR).epoch(2, 1))
    assert len(whole) == 3
    assert len(later) == 2
    for a, b in zip(whole[1:], later, strict=True):
        assert torch.equal(a[0].views, b[0].views)
        assert torch.equal(a[0].labels, b[0].labels)
        assert torch.equal(a[0].indices, b[0].indices)


@pytest.mark.parametrize("kind", KINDS)
def test_crops_are_torchvisions_of_the_boxes_that_all_loaders_draw(kind: str, make: Any, files: Source) -> None:
    loader = make(kind, scaled=False)
    batches = list(loader.crops(3, [torch.arange(42)]))
    assert len(batches) == 1
    crops = batches[0].crops
    assert crops.shape == (2, 42, 48, 48, 3)
    assert crops.dtype == torch.uint8
    for index in range(42):
        data = files.images.read(index)
        if data[:2] != b"\xff\xd8":
            image = torch.from_numpy(files.images[index]).permute(2, 0, 1)
        else:
            encoded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
            image = decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        heights, widths = (torch.tensor([n]) for n in image.shape[1:])
        for number, view in enumerate(CROPS):
            box = draw_boxes(
                view,
                seed=5,
                epoch=3,
                indices=torch.tensor([index]),
                view_index=number,
                heights=heights,
                widths=widths,
                size=48,
            )[0]
            expected = T.resized_crop(image, *box.tolist(), [48, 48], antialias=True).permute(1, 2, 0)
            error = (crops[number, index].float() - expected.float()).abs().mean().item()
            limit = 3 if kind == "ffcv" and index in ENCODED_ANEW else 1
            assert error < limit, f"image {index}, view {number}: mean difference {error} of 255"


@pytest.mark.parametrize("kind", KINDS)
def test_photographs_differ_by_less_than_3_of_255_between_loaders(kind: str, make: Any, tmp_path: Path) -> None:
    data = real("imagenet-sample").model_copy(update={"holdout": 0})
    source = open_source(data, "pretrain")
    positions = range(0, len(source), 25)
    own = source
    if kind == "ffcv":  # of the same bytes
        convert(gather(data, None)[0], tmp_path, Options("ffcv", max_side=0), workers=0)
        own = open_source(data.model_copy(update={"root": tmp_path}), "pretrain")
    crops = [
        next(make(name, images.select(positions), size=224).crops(0, [torch.arange(len(positions))])).crops.float()
        for name, images in ((kind, own), ("plain", source))
    ]
    assert (crops[0] - crops[1]).abs().mean((0, 2, 3, 4)).max() < 3


def test_the_resident_loader_draws_the_same_boxes_and_nearly_the_same_pixels(make: Any) -> None:
    source = open_source(real("imagenet-sample").model_copy(update={"holdout": 0}), "pretrain")
    some = source.select(range(0, len(source), 25))
    resident, plain = (make(kind, some, size=224, batch_size=len(some)) for kind in ("resident", "plain"))
    std = torch.tensor(source.std).view(3, 1, 1) * 255
    for a, b in zip(resident.epoch(1), plain.epoch(1), strict=True):
        assert torch.equal(a[0].indices, b[0].indices)
        errors = ((a[0].views - b[0].views) * std).abs().mean((0, 2, 3, 4))
        reduced = torch.tensor([max(some.images[i].shape) > 560 for i in a[0].indices.tolist()])
        assert 0 < reduced.sum() < 5, "the larger photographs were reduced once"
        assert errors.mean() < 3
        assert errors[~reduced].max() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_normalised_views_in_micro_batches(kind: str, make: Any) -> None:
    plan = (*SIMCLR, *POLICIES)
    whole = next(make(kind, plan=plan).epoch(0))[0]
    parts = next(make(kind, plan=plan, accumulation=3).epoch(0))
    assert whole.views.shape == (4, 12, 3, 48, 48)
    assert whole.views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert whole.labels.dtype == whole.indices.dtype == torch.int64
    assert whole.labels.tolist() == [0 if i < 21 else 1 for i in whole.indices.tolist()]
    assert len(parts) == 3
    assert torch.equal(torch.cat([part.views for part in parts], dim=1), whole.views)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_kept_are_not_overwritten(kind: str, make: Any) -> None:
    loader = make(kind, batch_size=3)
    kept = [batch[0] for batch in loader.epoch(0)]
    copies = [batch[0].views.clone() for batch in loader.epoch(0)]
    assert len(kept) == 14
    assert all(torch.equal(batch.views, copy) for batch, copy in zip(kept, copies, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_early_leaks_nothing(kind: str, make: Any) -> None:
    loader = make(kind, batch_size=3, plan=(View(),), size=16)
    expected = indices_of(loader, 1)
    before = threading.active_count()
    for _ in range(10):
        steps = loader.epoch(1)
        next(steps)
        steps.close()
    assert indices_of(loader, 1) == expected
    assert threading.active_count() <= before


@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_flat_over_20_epochs(kind: str, make: Any) -> None:
    loader = make(kind, size=96)
    process = psutil.Process()

    def memory() -> int:
        gc.collect()
        return sum(p.memory_info().rss for p in [process, *process.children(recursive=True)])

    for epoch in range(4):
        list(loader.epoch(epoch))
    sizes = []
    for epoch in range(20):
        list(loader.epoch(epoch))
        sizes.append(memory())
    # A leak of one batch an epoch would be 20 * 2 * 12 * 96 * 96 * 3 bytes, 13 MB.
    assert np.median(sizes[-5:]) - np.median(sizes[:5]) < 6e6


@pytest.mark.parametrize("kind", ["plain", "native", "dali"])
def test_a_broken_image_is_an_error_that_names_it(kind: str, make: Any, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "c"
    target.mkdir()
    for path in sorted(folder.rglob("*.jpg"))[:6]:
        (target / path.name).write_bytes(path.read_bytes())
    source = open_source(DataConfig(source="folder", root=tmp_path, holdout=0), "pretrain")
    broken = target / "008.jpg"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    loader = make(kind, source, batch_size=6, plan=(View(),))
    with pytest.raises(DataError, match=r"008\.jpg"):
        list(loader.epoch(0))
    assert len(list(loader.crops(0, [torch.arange(4)]))) == 1, "the loader can be used again"


@pytest.mark.parametrize("kind", ["native", "dali"])
def test_an_image_that_changed_since_its_size_was_read_is_an_error(kind: str, make: Any, tmp_path: Path) -> None:
    write_photos(tmp_path, 6)
    source = open_source(DataConfig(source="folder", root=tmp_path, holdout=0), "pretrain")
    loader = make(kind, source, batch_size=6)
    assert len(list(loader.epoch(0))) == 1
    (tmp_path / "class0" / "002.jpg").write_bytes((tmp_path / "class0" / "004.jpg").read_bytes())
    with pytest.raises(DataError, match=r"002\.jpg"):
        list(loader.epoch(1))


@pytest.mark.parametrize("kind", KINDS)
def test_two_epochs_in_turns_are_apart_or_refused(kind: str, make: Any) -> None:
    loader = make(kind, batch_size=6)
    alone = [indices_of(loader, epoch) for epoch in (0, 1)]
    first, second = loader.epoch(0), loader.epoch(1)
    next(first)
    if kind == "plain":
        with pytest.raises(RuntimeError, match="one epoch at a time"):
            next(second)
        first.close()
        assert indices_of(loader, 1) == alone[1]
        return
    taken = [[], []]
    for a, b in zip(first, second, strict=False):
        taken[0].append(a[0].indices.tolist())
        taken[1].append(b[0].indices.tolist())
    assert taken[0] == alone[0][1:]
    assert taken[1] == alone[1][:6]
    first.close()
    second.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_dalis_readers_is_for_them(kind: str, make: Any) -> None:
    loader = make(kind)
    assert loader.state() is None
    with pytest.raises(DataError, match=r"data\.reader=dali"):
        loader.load_state(torch.zeros(3, dtype=torch.uint8))


@pytest.mark.parametrize(("loader", "setting"), [("native", {"reader": "dali"}), ("ffcv", {"decode": "cpu"})])
def test_dalis_settings_are_for_dali(loader: str, setting: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="is for loader=dali, and the loader is"):
        LoaderConfig(loader=loader, **setting)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_sees_the_centre_through_the_same_loader(kind: str, files: Source, request: Any) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    source = request.getfixturevalue("packed") if kind == "ffcv" else files
    config = LoaderConfig(loader=kind, workers=1)
    batches = list(plain_batches(source, 112, 10, CPU, config))
    assert [len(positions) for _, positions in batches] == [10, 10, 10, 10, 2]
    assert torch.cat([positions for _, positions in batches]).tolist() == list(range(42))
    images = torch.cat([images for images, _ in batches])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (source.mean, source.std))
    for index in range(42):
        image = torch.from_numpy(files.images[index]).permute(2, 0, 1)
        side = min(image.shape[1:])
        square = T.crop(image, (image.shape[1] - side) // 2, (image.shape[2] - side) // 2, side, side)
        expected = T.center_crop(T.resize(square, [128], antialias=True), [112, 112])
        error = ((images[index] * std + mean) * 255 - expected.float()).abs().mean().item()
        assert error < (3 if kind == "ffcv" and index in ENCODED_ANEW else 1), f"image {index}"


def test_a_run_that_trained_on_a_beton_is_evaluated_on_files(files: Source) -> None:
    batches = plain_batches(files, 16, 42, CPU, LoaderConfig(loader="ffcv"))
    assert [len(positions) for _, positions in batches] == [42]


def test_workers_and_batches_in_flight_change_nothing(make: Any) -> None:
    one = list(make("native", plan=SIMCLR, workers=1, ahead=1).epoch(0))
    many = list(make("native", plan=SIMCLR, workers=5, ahead=4).epoch(0))
    assert all(torch.equal(a[0].views, b[0].views) for a, b in zip(one, many, strict=True))


def test_a_consumer_that_is_slow_finds_a_bounded_number_of_batches(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make("native", batch_size=3, ahead=2)
    begun = []
    make_one = loader._make
    monkeypatch.setattr(loader, "_make", lambda epoch, rows: (begun.append(1), make_one(epoch, rows))[1])
    steps = loader.epoch(0)
    next(steps)
    threading.Event().wait(0.5)
    assert len(begun) <= 1 + 2
    steps.close()


def test_auto_chooses_by_the_set_and_by_what_is_there(
    files: Source, packed: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = LoaderConfig()
    digits = open_source(DataConfig(), "pretrain")
    assert choose(digits, auto, 8, CPU)[0] == "resident"
    assert choose(files, auto, 48, CPU)[0] == "native", "held on the device, they would have to be reduced"
    assert choose(files, LoaderConfig(reader="dali"), 48, CPU)[0] == "dali"
    monkeypatch.setattr("pipelines.choice.free_bytes", lambda device: 1000)
    assert choose(digits, auto, 8, CPU)[0] == "native", "no room"
    assert choose(packed, auto, 48, CPU)[0] == "ffcv"
    monkeypatch.setattr("pipelines.choice.jpeg_decoder", lambda: None)
    monkeypatch.setattr("pipelines.choice.why_no_jpeg_decoder", lambda: "there is no C compiler")
    monkeypatch.setattr("pipelines.choice._installed", lambda name: name == "nvidia.dali")
    assert choose(files, auto, 48, CPU)[0] == "dali"
    monkeypatch.setattr("pipelines.choice._installed", lambda name: False)
    name, reason = choose(packed, auto, 48, CPU)
    assert name == "plain"
    assert "there is no C compiler" in reason
    assert "DALI is not installed" in reason


def test_ffcv_refuses_what_is_not_a_beton(files: Source) -> None:
    with pytest.raises(DataError, match=r"tools\.convert SOURCE DEST --to ffcv"):
        build_loader("ffcv", files, CROPS, config=LoaderConfig(), size=48, batch_size=4, seed=0, device=CPU)


def test_a_set_smaller_than_a_batch_is_refused(make: Any) -> None:
    with pytest.raises(DataError, match="has 42 training images, fewer than batch_size=43"):
        make("native", batch_size=43)
