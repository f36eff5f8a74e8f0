"""Policies: drawn as torchvision's classes draw, applied as they apply, and depending on the sample alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as T

from pipelines.choice import build_loader
from pipelines.config import LoaderConfig
from pipelines.draw import uniform_scalar
from pipelines.packed.conversion import convert
from pipelines.packed.encode import Options
from pipelines.packed.gathering import gather
from pipelines.policies import OPERATIONS, PolicyDraws, apply_policies, draw_policy
from pipelines.sources import DataConfig, Source, open_source
from pipelines.views import PLANS, View, draw_boxes, draw_photometric
from tests.pipelines.stored_sets import write_image

N = 20_000
NAMES = list(OPERATIONS)
AT: dict[str, Any] = {"seed": 11, "epoch": 2, "view_index": 1}
RANDAUGMENT = PLANS["mvmr_randaugment"][1]
AUTOAUGMENT = {name: View(policy=f"autoaugment_{name}") for name in ("imagenet", "cifar10", "svhn")}
EACH = {"randaugment": RANDAUGMENT, **AUTOAUGMENT}


def outcomes(draws: PolicyDraws) -> list[tuple[tuple[str, float], ...]]:
    """Of each image: (operation, signed magnitude), one after the other."""
    operations = [[NAMES[number] for number in row] for row in draws.operations.tolist()]
    return [tuple(zip(*row, strict=True)) for row in zip(operations, draws.magnitudes.tolist(), strict=True)]


def theirs(view: View) -> Any:
    if view.policy == "randaugment":
        return v2.RandAugment(num_ops=view.policy_ops, magnitude=view.policy_magnitude)
    return v2.AutoAugment(v2.AutoAugmentPolicy(view.policy.removeprefix("autoaugment_")))


def signed(magnitudes: torch.Tensor | None, level: int | None, either: bool) -> list[float]:
    """The equally likely magnitudes of an operation of torchvision's."""
    if magnitudes is None:
        return [0.0]
    magnitude = float(magnitudes[level])
    return [magnitude, -magnitude] if either else [magnitude]


def photographs(size: int, count: int) -> torch.Tensor:
    """[count, size, size, 3] uint8: parts of scikit-learn's two photographs, one of them all of a colour."""
    images = [torch.tensor(image) for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    crops = []
    for number in range(count):
        top, left = (int(torch.randint(427 - size, (), generator=generator)) for _ in range(2))
        crops.append(images[number % 2][top : top + size, left : left + size])
    crops[-1] = torch.full_like(crops[-1], 77)
    return torch.stack(crops)


@pytest.mark.parametrize(("magnitude", "size"), [(10, 32), (0, 224), (30, 96)])
def test_randaugment_draws_as_torchvision(magnitude: int, size: int) -> None:
    view = RANDAUGMENT.model_copy(update={"policy_magnitude": magnitude})
    draws = draw_policy(view, indices=torch.arange(N), size=size, **AT)
    assert draws.operations.shape == draws.magnitudes.shape == (N, 4)
    space = v2.RandAugment._AUGMENTATION_SPACE
    expected = {}
    for name, (magnitudes, either) in space.items():
        choices = signed(magnitudes(31, size, size), magnitude, either)
        for choice in choices:
            expected[name, choice] = expected.get((name, choice), 0) + N / len(space) / len(choices)
    rows = outcomes(draws)
    for step in range(4):
        assert_distributed(Counter(row[step] for row in rows), expected)
    for first, second in ((0, 1), (1, 3)):  # steps are drawn apart
        counts = torch.zeros(14, 14).index_put_(
            (draws.operations[:, first], draws.operations[:, second]), torch.tensor(1.0), accumulate=True
        )
        assert stats.chisquare(counts.flatten().numpy()).pvalue > 1e-3


@pytest.mark.parametrize("name", AUTOAUGMENT)
def test_autoaugment_draws_as_torchvision(name: str) -> None:
    """Of both operations together, the share of every outcome that torchvision's table gives."""
    policy, size = theirs(AUTOAUGMENT[name]), 96
    expected: Counter[Any] = Counter()
    for pair in policy._policies:
        steps: list[list[tuple[tuple[str, float], float]]] = []
        for operation, share, level in pair:
            magnitudes, either = policy._AUGMENTATION_SPACE[operation]
            choices = signed(magnitudes(10, size, size), level, either)
            happens = [((operation, choice), share / len(choices)) for choice in choices]
            steps.append([(("Identity", 0.0), 1 - share), *happens])
        for one, share_one in steps[0]:
            for two, share_two in steps[1]:
                expected[one, two] += N * share_one * share_two / len(policy._policies)
    found = Counter(outcomes(draw_policy(AUTOAUGMENT[name], indices=torch.arange(N), size=size, **AT)))
    assert_distributed(found, expected)


def assert_distributed(found: Counter[Any], expected: dict[Any, float]) -> None:
    possible = [key for key, count in expected.items() if count > 0]
    assert found.keys() <= set(possible), "what torchvision never does"
    counts, means = ([table[key] for key in possible] for table in (found, expected))
    assert sum(counts) == N
    assert stats.chisquare(counts, means).pvalue > 1e-3


@pytest.mark.parametrize("size", [32, 75])
@pytest.mark.parametrize("name", EACH)
def test_an_image_becomes_what_torchvision_makes_of_it(name: str, size: int) -> None:
    view, count = EACH[name], 160
    crops, indices = photographs(size, count), torch.arange(count)
    made = apply_policies((view,), crops[None], seed=11, epoch=2, indices=indices)[0]
    assert made.dtype == torch.uint8
    policy, applied = theirs(view), set()
    rows = outcomes(draw_policy(view, seed=11, epoch=2, view_index=0, indices=indices, size=size))
    for crop, ours, row in zip(crops, made, rows, strict=True):
        image = crop.permute(2, 0, 1)
        for operation, magnitude in row:
            if operation != "Identity":
                image = policy._apply_image_or_video_transform(
                    image, operation, magnitude, interpolation=policy.interpolation, fill=policy._fill
                )
                applied.add((operation, magnitude))
        assert torch.equal(ours, image.permute(1, 2, 0)), row
    if name == "randaugment":
        assert len(applied) == 13 + 9, "every operation but Identity, nine of them in both directions"


def test_every_strength_is_torchvisions() -> None:
    """At an odd size, where translations are cut to whole pixels, and at all 31 strengths."""
    crops = photographs(45, 40)
    for magnitude in range(31):
        view = View(policy="randaugment", policy_ops=1, policy_magnitude=magnitude)
        indices = torch.arange(magnitude * 40, (magnitude + 1) * 40)
        made = apply_policies((view,), crops[None], seed=0, epoch=0, indices=indices)[0]
        draws = draw_policy(view, seed=0, epoch=0, view_index=0, indices=indices, size=45)
        policy = theirs(view)
        for crop, ours, ((operation, drawn),) in zip(crops, made, outcomes(draws), strict=True):
            magnitudes, either = policy._AUGMENTATION_SPACE[operation]
            assert drawn in signed(magnitudes(31, 45, 45), magnitude, either)
            image = policy._apply_image_or_video_transform(
                crop.permute(2, 0, 1), operation, drawn, policy.interpolation, policy._fill
            )
            assert torch.equal(ours, image.permute(1, 2, 0)), (operation, drawn)


def test_views_without_a_policy_are_left_alone() -> None:
    crops, indices = torch.stack([photographs(32, 24)] * 4), torch.arange(24)
    none = (View(),) * 4
    assert apply_policies(none, crops, seed=1, epoch=0, indices=indices) is crops
    plan = (View(), RANDAUGMENT, View(flip=0.5), AUTOAUGMENT["svhn"])
    before = crops.clone()
    made = apply_policies(plan, crops, seed=1, epoch=0, indices=indices)
    assert torch.equal(crops, before), "the loader's memory is not written to"
    assert torch.equal(made[[0, 2]], crops[[0, 2]])
    for number in (1, 3):  # as if each were alone at its place
        alone = tuple(view if place == number else View() for place, view in enumerate(plan))
        expected = apply_policies(alone, crops, seed=1, epoch=0, indices=indices)[number]
        assert torch.equal(made[number], expected)
        assert (made[number] != crops[number]).flatten(1).any(1).float().mean() > 0.5


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    """24 images as large as the views, as PNGs and as the pixels in a .beton: what no loader rounds."""
    root, target = tmp_path_factory.mktemp("squares"), tmp_path_factory.mktemp("packed")
    for number in range(24):
        write_image(root / "a" / f"{number:02}.png", (48, 48), seed=number)
    data = DataConfig(source="folder", root=root, holdout=0)
    convert(gather(data, None)[0], target, Options("ffcv", max_side=0, write_mode="raw"), workers=0)
    packed = data.model_copy(update={"root": target})
    return {"files": open_source(data, "pretrain"), "packed": open_source(packed, "pretrain")}


@pytest.mark.parametrize("kind", ["plain", "native", "ffcv", "dali", "resident"])
def test_policies_are_the_same_in_every_loader(kind: str, lossless: dict[str, Source]) -> None:
    """Pixel for pixel where the crops are, and those are where nothing is resized or decoded with a loss."""
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    source = lossless["files"]
    plan = (View(), View(crop="pad_and_crop", policy="randaugment"), View(flip=0.5, policy="autoaugment_svhn"))
    settings: dict[str, Any] = {"size": 48, "batch_size": 24, "seed": 5, "device": torch.device("cpu")}
    config = LoaderConfig(loader=kind, workers=1)
    loader = build_loader(kind, lossless["packed" if kind == "ffcv" else "files"], plan, config=config, **settings)
    [[batch]] = loader.epoch(1)
    loader.close()
    images = torch.from_numpy(np.stack([source.images[i] for i in batch.indices.tolist()]))
    draws: dict[str, Any] = {"seed": 5, "epoch": 1, "indices": batch.indices}
    sides = torch.full((24,), 48)
    boxes = draw_boxes(plan[1], view_index=1, heights=sides, widths=sides, size=48, **draws).tolist()
    shifted = [T.crop(image, *box) for image, box in zip(images.permute(0, 3, 1, 2), boxes, strict=True)]
    crops = torch.stack([images, torch.stack(shifted).permute(0, 2, 3, 1), images])
    expected = apply_policies(plan, crops, **draws).permute(0, 1, 4, 2, 3) / 255
    flipped = draw_photometric(plan[2], view_index=2, size=48, **draws).flip
    assert 0 < flipped.sum() < 24
    expected[2, flipped] = expected[2, flipped].flip(-1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (source.mean, source.std))
    assert (batch.views * std + mean - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name", EACH)
def test_draws_depend_on_the_sample_alone(name: str) -> None:
    view, every = EACH[name], torch.arange(300)
    some = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:40]
    whole = outcomes(draw_policy(view, indices=every, size=32, **AT))
    assert outcomes(draw_policy(view, indices=some, size=32, **AT)) == [whole[i] for i in some.tolist()]
    for change in ({"seed": 12}, {"epoch": 3}, {"view_index": 0}):
        other = outcomes(draw_policy(view, indices=every, size=32, **(AT | change)))
        assert sum(a == b for a, b in zip(whole, other, strict=True)) < 90


def test_which_number_is_used_for_what_never_changes() -> None:
    """A seed means the same in every version; the numbers themselves are pinned by the tests of `pipelines.draw`."""
    indices = [0, 5, 49_999, 123]
    at = {"seed": 7, "epoch": 3, "view_index": 1, "indices": torch.tensor(indices), "size": 224}
    draws = draw_policy(RANDAUGMENT, **at)
    for row, index in enumerate(indices):
        for step in range(4):
            number, sign = (uniform_scalar(7, 3, index, 1, slot + 3 * step) for slot in (65, 67))
            assert draws.operations[row, step] == int(14 * number)
            assert draws.magnitudes[row, step] >= 0 or sign < 0.5
    for view in AUTOAUGMENT.values():
        table, chosen = theirs(view)._policies, draw_policy(view, **at).operations
        for row, index in enumerate(indices):
            pair = table[int(25 * uniform_scalar(7, 3, index, 1, 64))]
            for step, (operation, share, _) in enumerate(pair):
                happens = uniform_scalar(7, 3, index, 1, 66 + 3 * step) < share
                assert NAMES[chosen[row, step]] == (operation if happens else "Identity")


def test_any_policy_makes_a_view_augmented() -> None:
    assert all(View(policy=view.policy).augmented for view in EACH.values())
    assert not View(policy_ops=3, policy_magnitude=4).augmented
