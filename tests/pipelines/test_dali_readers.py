"""DALI reading by itself: every image once an epoch, exact resume, and refusals where DALI would be silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.dali import DaliLoader
from pipelines.loading import in_background
from pipelines.packed.images import PackedImages
from pipelines.sources import DataError, Source
from pipelines.stored.images import ArrayImages
from pipelines.views import View
from tests.pipelines.dali_sets import WHOLE, cut_off, dali_loader, indices_of, open_folder, packed, small_set
from tests.pipelines.stored_sets import noise, write_tree

pytest.importorskip("nvidia.dali")

Make = Callable[..., DaliLoader]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return small_set(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module", params=["file", "webdataset", "tfrecord"])
def stored(request: pytest.FixtureRequest, small: Source, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """The same images as DALI's three readers take them."""
    if request.param == "file":
        return small
    return replace(small, images=packed(small, request.param, tmp_path_factory.mktemp(request.param)))


@pytest.fixture
def make() -> Iterator[Make]:
    """`dali_loader`, closed in the end."""
    with ExitStack() as loaders:
        yield lambda *args, **settings: loaders.enter_context(closing(dali_loader(*args, **settings)))


@pytest.mark.parametrize("last", ["drop", "pad"])
def test_every_image_comes_once_an_epoch(last: str, stored: Source, make: Make) -> None:
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
                assert set(seen) == set(range(41))
            orders.append(seen)
        assert orders[0] != orders[1] != orders[2]


def test_images_are_numbered_as_in_the_source(stored: Source, make: Make) -> None:
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
def test_a_resumed_epoch_goes_on_exactly(
    stop: int, stored: Source, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a consumer that has `stop` of the 3 batches of epoch 1, though DALI is ahead of it."""
    loader = make(stored, reader="dali", rank=1, world_size=2)
    # As on a GPU, where a thread fetches batches before they are asked for.
    monkeypatch.setattr(loader, "on_device", lambda batches: in_background(batches, 1))
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


def test_an_epoch_goes_on_where_it_was_left(small: Source, make: Make) -> None:
    expected = indices_of(make(small, reader="dali"), 0)
    loader = make(small, reader="dali")
    steps = loader.epoch(0)
    first = [next(steps)[0].indices.tolist()]
    steps.close()
    assert first + indices_of(loader, 0, 1) == expected
    assert indices_of(loader, 0) == expected, "the beginning can always be had again"
    with pytest.raises(DataError, match=r"stands at step 0 of epoch 1 and cannot go to step 2 of epoch 1"):
        indices_of(loader, 1, 2)


def test_the_state_of_another_run_is_refused(small: Source, make: Make) -> None:
    loader = make(small, reader="dali", world_size=2)
    next(loader.epoch(0))
    state = loader.state()
    assert state is not None
    swapped = small.select([1, 0, *range(2, 41)])
    for told, source, changes in (
        ("batch size 12 (now 6)", small, {"batch_size": 6}),
        ("shard 0 (now 1)", small, {"rank": 1}),
        ("ranks 2 (now 1)", small, {"world_size": 1}),
        ("seed 5 (now 6)", small, {"seed": 6}),
        ("images 41 (now 40)", small.select(range(40)), {}),
        ("their hash", swapped, {}),
        ("crops [[0.08,", small, {"plan": (View(crop="random_resized", crop_scale=(0.2, 1)),) * 2}),
    ):
        with pytest.raises(DataError) as caught:
            make(source, **({"reader": "dali", "world_size": 2} | changes)).load_state(state)
        assert told in str(caught.value)
    with pytest.raises(DataError, match=r"no state of data\.reader=dali"):
        loader.load_state(torch.arange(50, dtype=torch.uint8))


def test_what_a_reader_cannot_serve_is_refused(stored: Source, make: Make) -> None:
    with pytest.raises(DataError, match=r"view 0 has crop=whole; set data\.reader=ours"):
        make(stored, WHOLE, reader="dali")
    pixels = replace(stored, images=ArrayImages(noise(41, 8, 8, 3)))
    with pytest.raises(DataError, match=r"is an array in memory; set data\.reader=ours"):
        make(pixels, reader="dali")
    part = stored.select(range(30))
    if isinstance(stored.images, PackedImages):
        with pytest.raises(DataError, match=r"has 30 images, but its shards hold 41.*data\.holdout=0"):
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


def test_a_broken_image_is_reported(make: Make, tmp_path: Path) -> None:
    write_tree(tmp_path, {"a": 12}, suffix=".jpg")
    loader = make(open_folder(tmp_path), reader="dali")
    cut_off(tmp_path / "a" / "003.jpg")
    with pytest.raises(DataError, match=r"does not say which image is broken: data\.reader=ours does"):
        list(loader.epoch(0))


def test_shards_without_positions_are_refused(make: Make, small: Source, tmp_path: Path) -> None:
    source = replace(small, images=packed(small, "webdataset", tmp_path))
    for path in tmp_path.glob("*.idx"):
        head, *lines = path.read_text().splitlines()
        path.write_text("\n".join([head, *(line[: line.index(" index ")] for line in lines)]) + "\n")
    with pytest.raises(DataError, match=r"(?s)DALI cannot read folder/pretrain: .*data\.reader=ours"):
        next(make(source, reader="dali").epoch(0))
