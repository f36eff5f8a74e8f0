"""Plans and their validation, and that draws follow torchvision's distributions and depend on nothing
else."""

import json
import warnings
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torchvision.transforms import v2

from kernels import PhotometricParams
from pipelines.views import PLANS, View, ViewsConfig, center_boxes, draw_boxes, draw_photometric

N = 4_000
AT: dict[str, Any] = {"seed": 11, "epoch": 2, "view_index": 1, "size": 32}


def _boxes(view: View, height: int, width: int, indices: torch.Tensor | None = None, **at: Any) -> torch.Tensor:
    indices = torch.arange(N) if indices is None else indices
    full = torch.full_like(indices, 1)
    return draw_boxes(view, indices=indices, heights=full * height, widths=full * width, **(AT | at))


# ---- plans ----


@pytest.mark.parametrize("name", PLANS)
def test_named_plans_resolve_to_themselves(name: str) -> None:
    config = ViewsConfig(plan=name)
    assert config.resolve() == PLANS[name]
    assert ViewsConfig(**json.loads(config.model_dump_json())) == config


def test_the_papers_numbers() -> None:
    simclr, small = ViewsConfig(plan="simclr").resolve()[0], ViewsConfig(plan="simclr_cifar").resolve()[0]
    assert (simclr.brightness, simclr.contrast, simclr.saturation, simclr.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (simclr.jitter, simclr.grayscale, simclr.flip, simclr.blur) == (0.8, 0.2, 0.5, 0.5)
    assert (small.brightness, small.hue, small.blur) == (0.4, 0.1, 0.0)
    one, two = ViewsConfig(plan="byol").resolve()
    assert (one.blur, two.blur, one.solarize, two.solarize) == (1.0, 0.1, 0.0, 0.2)
    assert (one.brightness, one.contrast, one.saturation, one.hue) == (0.4, 0.4, 0.2, 0.1)
    plain, augmented = ViewsConfig(plan="mvmr").resolve()
    assert not plain.augmented
    assert augmented.augmented
    assert all(view.flip == 0 and view.hue == 0 for view in ViewsConfig(plan="digits").resolve())
    policies = {name: PLANS[f"mvmr_{name}"] for name in ("randaugment", "autoaugment", "cifar", "cifar20")}
    for plain, augmented in policies.values():
        assert plain == PLANS["mvmr"][0]
        assert augmented.augmented
    augmented = policies["randaugment"][1]
    assert (augmented.policy, augmented.policy_ops, augmented.policy_magnitude) == ("randaugment", 4, 10)
    assert (augmented.crop_scale, augmented.flip, augmented.jitter) == ((0.08, 1.0), 0, 0)
    assert (policies["autoaugment"][1].policy, policies["autoaugment"][1].crop) == (
        "autoaugment_imagenet",
        "random_resized",
    )
    assert (policies["cifar"][1].crop, policies["cifar"][1].pad, policies["cifar"][1].flip) == ("pad_and_crop", 4, 0.5)
    small = policies["cifar20"][1]
    assert (small.brightness, small.contrast, small.saturation, small.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (small.jitter, small.grayscale, small.flip, small.crop_scale) == (0.8, 0.1, 0.5, (0.2, 1.0))


def test_strength_scales_the_jitter_from_the_plans_own() -> None:
    for plan in ("simclr_cifar", "mvmr_cifar20"):
        assert ViewsConfig(plan=plan, strength=0.5).resolve() == PLANS[plan]
    view = ViewsConfig(plan="simclr", strength=0.5).resolve()[0]
    assert (view.brightness, view.hue, view.jitter) == (0.4, 0.1, 0.8)


def test_override_reaches_augmented_views_only() -> None:
    plain, augmented = ViewsConfig(plan="mvmr", override={"crop_scale": [0.2, 1], "flip": 0.1}).resolve()
    assert plain == PLANS["mvmr"][0]
    assert (augmented.crop_scale, augmented.flip) == ((0.2, 1.0), 0.1)
    assert {v.blur_kernel for v in ViewsConfig(plan="mvmr", override={"blur_kernel": 5}).resolve()} == {5}


def test_custom_plan() -> None:
    config = ViewsConfig.model_validate({"custom": [{"crop": "whole"}, {"crop": "random_resized", "flip": 0.5}]})
    assert len(config.resolve()) == 2
    assert ViewsConfig(**config.model_dump()) == config
    config = ViewsConfig.model_validate({"custom": [{"policy": "randaugment", "policy_ops": 3}]})
    assert (config.resolve()[0].policy_ops, config.resolve()[0].policy_magnitude) == (3, 9)


def test_a_policy_can_be_put_into_a_named_plan() -> None:
    plain, augmented = ViewsConfig(plan="mvmr", override={"policy": "autoaugment_svhn"}).resolve()
    assert (plain.policy, augmented.policy) == ("none", "autoaugment_svhn")


def test_kernel_is_a_tenth_of_the_side() -> None:
    assert [View().kernel(size) for size in (8, 32, 96, 224)] == [3, 3, 9, 23]
    assert View(blur_kernel=7).kernel(32) == 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"plan": "simclrcifar"}, "simclr_cifar"),
        ({"override": {"crop_sale": [0.2, 1]}}, "nearest: 'crop_scale'"),
        ({"override": {"hue": 0.7}}, r"hue: expected a number in \[0, 0.5\]"),
        ({"override": {"blur_kernel": 4}}, "blur_kernel: expected an odd number"),
        ({"strength": 3.0}, "hue"),
        ({"strength": -1.0}, "strength"),
        ({"strength": 1.0, "custom": [{"crop": "whole"}]}, "remove strength"),
        ({"custom": []}, "at least one view"),
        ({"custom": [{"flip": 1.5}]}, r"\[0, 1\]"),
        ({"custom": [{"crop_scale": [1.0, 0.2]}]}, "low <= high"),
        ({"custom": [{"crop_scale": [0.2, 2.0]}]}, "at most 1"),
        ({"custom": [{"blur_sigma": [0, 2]}]}, "low <= high"),
        ({"custom": [{"blur_kernel": 3}, {"blur_kernel": 5}]}, "blur_kernel must be the same"),
        ({"custom": [{"colour": 1}]}, "colour"),
        ({"plans": "byol"}, "plans"),
        ({"custom": [{"policy": "randaug"}]}, "policy"),
        ({"override": {"policy_magnitude": 31}}, "policy_magnitude: .*30"),
        ({"override": {"policy_ops": 0}}, "policy_ops: .*1"),
    ],
)
def test_refusals_name_the_thing(config: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViewsConfig.model_validate(config)


# ---- boxes ----


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(32, 32, (0.08, 1.0)), (375, 500, (0.08, 1.0)), (96, 96, (0.4, 1.0)), (60, 200, (0.6, 1.0))],
)
def test_random_resized_boxes_follow_torchvision(height: int, width: int, scale: tuple[float, float]) -> None:
    theirs = v2.RandomResizedCrop(32, scale=scale)
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    drawn = [theirs.make_params([image]) for _ in range(N)]
    expected = torch.tensor([[d["top"], d["left"], d["height"], d["width"]] for d in drawn]).double()
    boxes = _boxes(View(crop="random_resized", crop_scale=scale), height, width).double()
    _inside(boxes, height, width)
    for name, ours, other in [
        ("top", boxes[:, 0], expected[:, 0]),
        ("left", boxes[:, 1], expected[:, 1]),
        ("height", boxes[:, 2], expected[:, 2]),
        ("width", boxes[:, 3], expected[:, 3]),
        ("area", boxes[:, 2] * boxes[:, 3], expected[:, 2] * expected[:, 3]),
        ("ratio", boxes[:, 3] / boxes[:, 2], expected[:, 3] / expected[:, 2]),
    ]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy says so when it needs the asymptotic p value
            assert stats.ks_2samp(ours.numpy(), other.numpy()).pvalue > 1e-3, name


def _inside(boxes: torch.Tensor, height: int, width: int) -> None:
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert ((boxes[:, 0] + boxes[:, 2]) <= height).all()
    assert ((boxes[:, 1] + boxes[:, 3]) <= width).all()


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (10, 500, [0, 243, 10, 13]),  # too wide: full height, the largest ratio
        (500, 10, [243, 0, 13, 10]),  # too tall
        (1, 1, [0, 0, 1, 1]),  # nothing fits: whole image
    ],
)
def test_fallback_is_torchvisions_central_box(height: int, width: int, box: list[int]) -> None:
    view = View(crop="random_resized", crop_scale=(0.9, 1.0) if height != width else (0.01, 0.02))
    boxes = _boxes(view, height, width, torch.arange(50))
    theirs = v2.RandomResizedCrop(32, scale=view.crop_scale).make_params([torch.empty(3, height, width)])
    assert [theirs[key] for key in ("top", "left", "height", "width")] == box
    assert (boxes == torch.tensor(box)).all()


def test_pad_and_crop_is_uniform_and_of_the_images_own_size() -> None:
    boxes = _boxes(View(crop="pad_and_crop", pad=4), 32, 32)
    assert (boxes[:, 2:] == 32).all()
    for axis in (0, 1):
        values, counts = boxes[:, axis].unique(return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert _boxes(View(crop="pad_and_crop", pad=4), 64, 32).amin(0)[:2].tolist() == [
        -8,
        -4,
    ]  # pad in output pixels


def test_whole_and_center() -> None:
    assert _boxes(View(crop="whole"), 30, 50)[0].tolist() == [0, 0, 30, 50]
    assert _boxes(View(crop="center"), 30, 50)[0].tolist() == [0, 10, 30, 30]
    assert center_boxes(torch.tensor([256]), torch.tensor([341])).tolist() == [[0, 42, 256, 256]]


# ---- photometric parameters ----


def test_photometric_distributions() -> None:
    view = PLANS["byol"][1].model_copy(update={"blur": 0.5})
    params = draw_photometric(view, indices=torch.arange(N), **AT)
    for name, share in [("flip", 0.5), ("jitter", 0.8), ("grayscale", 0.2), ("solarize", 0.2)]:
        assert stats.binomtest(int(getattr(params, name).sum()), N, share).pvalue > 1e-3, name
    ranges = {"brightness": (0.6, 0.8), "contrast": (0.6, 0.8), "saturation": (0.8, 0.4), "hue": (-0.1, 0.2)}
    for name, (low, length) in ranges.items():
        assert stats.kstest(getattr(params, name).numpy(), "uniform", (low, length)).pvalue > 1e-3, name
    sigma = params.blur_sigma[params.blur_sigma > 0]
    assert stats.binomtest(len(sigma), N, 0.5).pvalue > 1e-3
    assert stats.kstest(sigma.numpy(), "uniform", (0.1, 1.9)).pvalue > 1e-3
    assert torch.equal(params.order.sort(dim=1).values, torch.arange(4).expand(N, 4))
    _, counts = (params.order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert (params.blur_kernel, params.solarize_threshold) == (3, 0.5)
    strong = draw_photometric(view.model_copy(update={"contrast": 1.5}), indices=torch.arange(N), **AT)
    assert 0 <= strong.contrast.min() < 0.01  # 1 - 1.5 is cut at 0, as torchvision does
    assert strong.contrast.max() > 2.49


# ---- purity ----


def _rows(params: PhotometricParams) -> torch.Tensor:
    names = (
        "flip",
        "jitter",
        "brightness",
        "contrast",
        "saturation",
        "hue",
        "grayscale",
        "blur_sigma",
        "solarize",
    )
    return torch.cat([torch.stack([getattr(params, n).double() for n in names], 1), params.order.double()], 1)


@pytest.mark.parametrize("crop", ["random_resized", "pad_and_crop"])
def test_draws_depend_on_the_sample_alone(crop: str) -> None:
    view = PLANS["byol"][1].model_copy(update={"crop": crop})
    every = torch.arange(300)
    some = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:40]
    heights, widths = 40 + every % 7, 50 + every % 11
    boxes = draw_boxes(view, indices=every, heights=heights, widths=widths, **AT)
    again = draw_boxes(view, indices=some, heights=heights[some], widths=widths[some], **AT)
    assert torch.equal(boxes[some], again)
    params = _rows(draw_photometric(view, indices=every, **AT))
    assert torch.equal(params[some], _rows(draw_photometric(view, indices=some, **AT)))
    for change in ({"seed": 12}, {"epoch": 3}, {"view_index": 0}):
        other = draw_boxes(view, indices=every, heights=heights, widths=widths, **(AT | change))
        assert (other == boxes).all(1).float().mean() < 0.1
        assert (_rows(draw_photometric(view, indices=every, **(AT | change))) == params).all(1).sum() == 0
