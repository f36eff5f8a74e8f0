"""The resident loader: what a step sees depends on (seed, epoch, index, view) and on nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as T

from pipelines.draw import permutation
from pipelines.plain_views import plain_batches
from pipelines.resident import ResidentLoader
from pipelines.sources import DataConfig, DataError, Source, open_source
from pipelines.views import ViewsConfig, draw_boxes, draw_photometric

CPU = torch.device("cpu")
PLAN = ViewsConfig(plan="digits").resolve()


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(DataConfig(source="digits", limit=203), "pretrain")


def loader(source: Source, **changes: object) -> ResidentLoader:
    settings = {"size": 8, "batch_size": 24, "seed": 3, "device": CPU} | changes
    return ResidentLoader(source, PLAN, **settings)


def joined(micro_batches: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.cat([b.views for b in micro_batches], 1),
        torch.cat([b.labels for b in micro_batches]),
        torch.cat([b.indices for b in micro_batches]),
    )


def test_ranks_and_micro_batches_change_nothing(digits: Source) -> None:
    whole = [joined(step) for step in loader(digits).epoch(2)]
    assert len(whole) == loader(digits).steps_per_epoch == 203 // 24
    for world_size, accumulation in ((1, 3), (2, 1), (3, 4), (2, 6)):
        parts = [
            list(loader(digits, rank=r, world_size=world_size, accumulation=accumulation).epoch(2))
            for r in range(world_size)
        ]
        for step, expected in enumerate(whole):
            got = joined([micro for rank in parts for micro in rank[step]])
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_an_epoch_can_begin_anywhere(digits: Source) -> None:
    steps = [joined(step) for step in loader(digits).epoch(5)]
    for first in (1, 7):
        later = [joined(step) for step in loader(digits).epoch(5, first)]
        assert len(later) == len(steps) - first
        assert all(torch.equal(a[0], b[0]) for a, b in zip(later, steps[first:], strict=True))
    assert list(loader(digits).epoch(5, 8)) == []


def test_epochs_differ_and_cover_the_set(digits: Source) -> None:
    seen = [torch.cat([joined(s)[2] for s in loader(digits).epoch(e)]) for e in (0, 1)]
    assert all(len(set(order.tolist())) == len(order) == 192 for order in seen)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], permutation(3, 1, 203)[:192])
    first = loader(digits).views(torch.arange(5), epoch=0).views
    second = loader(digits).views(torch.arange(5), epoch=1).views
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1]), "the views of an image differ"


def test_a_view_does_not_depend_on_its_neighbours(digits: Source) -> None:
    a = loader(digits).views(torch.tensor([5, 9, 100]), epoch=4)
    b = loader(digits).views(torch.tensor([100, 7]), epoch=4)
    assert torch.equal(a.views[:, 2], b.views[:, 0])
    assert a.labels[2] == b.labels[0] == digits.labels[100]


def test_batches_are_normalised_channels_last_views(digits: Source) -> None:
    batch = next(loader(digits).epoch(0))[0]
    assert batch.views.shape == (2, 24, 3, 8, 8)
    assert batch.views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == batch.indices.dtype == torch.int64


@pytest.fixture
def photos(tmp_path: Path) -> Source:
    from sklearn.datasets import load_sample_images

    for number, (photo, box) in enumerate(
        (p, b) for p in load_sample_images().images for b in ((0, 0, 90, 70), (100, 50, 300, 250), (40, 200, 104, 296))
    ):
        folder = tmp_path / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(photo).crop(box).save(folder / f"{number}.png")
    return open_source(DataConfig(source="folder", root=tmp_path, holdout=0), "pretrain")


@pytest.mark.parametrize("decoded_at_once", [1024, 2])  # by two the canvas grows on the way
def test_photographs_of_many_sizes_against_torchvision(
    photos: Source, decoded_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stacking._BLOCK", decoded_at_once)
    size = 48
    plan = ViewsConfig(plan="simclr", override={"jitter": 0, "grayscale": 0, "blur": 0}).resolve()
    resident = ResidentLoader(photos, plan, size=size, batch_size=6, seed=0, device=CPU)
    batch = resident.views(torch.arange(6), epoch=0)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (photos.mean, photos.std))
    for i in range(6):
        stored = photos.images[i]
        height, width = (torch.tensor([n]) for n in stored.shape[:2])
        factors = torch.ones(2)
        if max(stored.shape[:2]) > 120:  # kept at 2.5 times the view size
            factor = 120 / max(stored.shape[:2])
            shape = (round(stored.shape[1] * factor), round(stored.shape[0] * factor))
            factors = torch.tensor([shape[1] / stored.shape[0], shape[0] / stored.shape[1]])
            stored = np.asarray(Image.fromarray(stored).resize(shape, Image.Resampling.BILINEAR))
        image = torch.from_numpy(np.array(stored)).permute(2, 0, 1)
        for v, view in enumerate(plan):
            draws = {"seed": 0, "epoch": 0, "indices": torch.tensor([i]), "view_index": v}
            drawn = draw_boxes(view, **draws, heights=height, widths=width, size=size)[0]
            start, end = ((edge * factors).round().int() for edge in (drawn[:2], drawn[:2] + drawn[2:]))
            box = [*start.tolist(), *(end - start).tolist()]
            expected = T.resized_crop(image, *box, [size, size], antialias=True)
            if draw_photometric(view, **draws, size=size).flip[0]:
                expected = T.horizontal_flip(expected)
            got = (batch.views[v, i] * std + mean) * 255
            assert (got - expected.float()).abs().mean() < 1, "mean error of a crop, of 255"


def test_plain_views_against_torchvision(photos: Source) -> None:
    (images, positions), *rest = plain_batches(photos, 112, 10, CPU)
    assert rest == []
    assert positions.tolist() == list(range(6))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (photos.mean, photos.std))
    for i in range(6):
        image = torch.from_numpy(np.array(photos.images[i])).permute(2, 0, 1)
        expected = T.center_crop(T.resize(image, [128], antialias=True), [112, 112])  # 256 -> 224, by half
        got = (images[i] * std + mean) * 255
        assert (got - expected.float()).abs().mean() < 3, "our one resampling against torchvision's resize and cut"


def test_what_cannot_work_is_refused(digits: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="203 training images, fewer than batch_size=204"):
        loader(digits, batch_size=204)
    with pytest.raises(ValueError, match="batch_size=24 cannot be divided over 5 ranks × 1"):
        loader(digits, world_size=5)
    monkeypatch.setattr("pipelines.resident.psutil.virtual_memory", lambda: type("M", (), {"available": 1000})())
    with pytest.raises(DataError, match=r"0\.0 GB free"):
        loader(digits)
