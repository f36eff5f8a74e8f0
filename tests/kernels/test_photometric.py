"""Each photometric operation, and whole random chains, against torchvision.transforms.v2.functional in
float32."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional

from kernels import PhotometricParams, photometric, photometric_reference
from kernels.photometric import ORDERS

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@cache
def crops(count: int, size: int) -> Tensor:
    """[count, size, size, 3] uint8: patches of two photos and, one in eight, a digit (gray, with pure
    black)."""
    photos = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    digits = (torch.from_numpy(load_digits().images) * 255 / 16).to(torch.uint8)
    generator = torch.Generator().manual_seed(size)
    patches = []
    for i in range(count):
        if i % 8 == 7:
            patch = digits[i][None].expand(3, -1, -1)
        else:
            top, left = torch.randint(0, 227, (2,), generator=generator).tolist()
            patch = photos[i % 2, top : top + 200, left : left + 200].permute(2, 0, 1)
        patches.append(functional.resize(patch, [size, size]).permute(1, 2, 0))
    return torch.stack(patches).contiguous()


def random_params(count: int, kernel: int = 3, seed: int = 0) -> PhotometricParams:
    generator = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    def chance(share: float) -> Tensor:
        return torch.rand(count, generator=generator) < share

    return PhotometricParams(
        flip=chance(0.5),
        jitter=chance(0.8),
        order=torch.rand(count, 4, generator=generator).argsort(dim=1),
        brightness=between(0.2, 1.8),
        contrast=between(0.2, 1.8),
        saturation=between(0.2, 1.8),
        hue=between(-0.5, 0.5),
        grayscale=chance(0.2),
        blur_sigma=between(0.1, 2.0) * chance(0.5),
        solarize=chance(0.2),
        blur_kernel=kernel,
    )


def torchvision_views(images: Tensor, params: PhotometricParams, mean: tuple, std: tuple) -> Tensor:
    jitter = (
        (functional.adjust_brightness, params.brightness),
        (functional.adjust_contrast, params.contrast),
        (functional.adjust_saturation, params.saturation),
        (functional.adjust_hue, params.hue),
    )
    views = []
    for i, image in enumerate(images):
        x = functional.to_dtype(image.permute(2, 0, 1), torch.float32, scale=True)
        if params.flip[i]:
            x = functional.horizontal_flip(x)
        for operation in params.order[i].tolist() if params.jitter[i] else ():
            adjust, factor = jitter[operation]
            x = adjust(x, factor[i].item())
        if params.grayscale[i]:
            x = functional.rgb_to_grayscale(x, num_output_channels=3)
        if params.blur_sigma[i] > 0:
            x = functional.gaussian_blur(x, [params.blur_kernel] * 2, [params.blur_sigma[i].item()] * 2)
        if params.solarize[i]:
            x = functional.solarize(x, params.solarize_threshold)
        views.append(functional.normalize(x, list(mean), list(std)))
    return torch.stack(views)


def drawn_images(count: int, height: int, width: int) -> Tensor:
    """[count, height, width, 3] uint8: smooth slopes with noise, a patch of pure black, one of pure white, one of
    pure colours and one gray."""
    generator = torch.Generator().manual_seed(height * width)
    y = torch.linspace(0, 1, height)[None, :, None, None]
    x = torch.linspace(0, 1, width)[None, None, :, None]
    slopes = torch.rand(3, count, 1, 1, 3, generator=generator) * 255
    smooth = slopes[0] * y + slopes[1] * x + slopes[2] * (1 - x * y)
    noisy = smooth / 2 + 30 * torch.randn(count, height, width, 3, generator=generator)
    images = noisy.clamp(0, 255).to(torch.uint8)
    down, across = max(height // 4, 1), max(width // 4, 1)
    images[:, :down, :across] = 0
    images[:, -down:, :across] = 255
    images[:, :down, -across:] //= 128
    images[:, :down, -across:] *= 255
    images[:, -down:, -across:] = images[:, -down:, -across:, :1]
    return images.contiguous()


def every_order(count: int, kernel: int = 3, seed: int = 0) -> PhotometricParams:
    """Random chains through all 24 orders of the jitter in turn."""
    params = random_params(count, kernel, seed)
    params.jitter = torch.ones(count, dtype=torch.bool)
    params.order = torch.tensor(ORDERS)[torch.arange(count) % 24]
    return params


def extremes(kernel: int) -> PhotometricParams:
    """The ends of every range, each alone: factors of 0 and 5, half a turn, tiny and large sigmas."""
    changes = [{name: value} for name in ("brightness", "contrast", "saturation") for value in (0.0, 1e-3, 1.0, 5.0)]
    changes += [{"hue": value} for value in (-0.5, -1 / 3, -1e-4, 0.25, 0.5)]
    changes += [{"blur_sigma": value} for value in (0.1, 0.25, 1.0, 5.0, 100.0)]
    changes += [{"flip": True}, {"grayscale": True}, {"solarize": True}]
    params = PhotometricParams.identity(len(changes))
    for name in ("flip", "grayscale", "solarize", "brightness", "contrast", "saturation"):
        setattr(params, name, getattr(params, name).clone())  # `identity` shares one tensor among several
    params.jitter = torch.ones(len(changes), dtype=torch.bool)
    for row, change in enumerate(changes):
        for name, value in change.items():
            getattr(params, name)[row] = value
    params.blur_kernel = kernel
    return params


def check(
    images: Tensor, params: PhotometricParams, *backends: str, tolerance: float = 5e-6, device: str = "cpu"
) -> None:
    """Against torchvision, everywhere but where a value lies so close to the threshold of solarising, which is a jump,
    that rounding decides."""
    before = replace(params, solarize=torch.zeros(len(images), dtype=torch.bool))
    expected, unsolarised = (torchvision_views(images, p, **PLAIN) for p in (params, before))
    near = (unsolarised - params.solarize_threshold).abs() < tolerance
    decided = ~(near & params.solarize.view(-1, 1, 1, 1))
    assert decided.float().mean() > 0.99
    for backend in backends or ("tiled", "reference"):
        ours = photometric(images.to(device), params, **PLAIN, backend=backend)
        assert ours.shape == (len(images), 3, *images.shape[1:3])
        assert ours.is_contiguous(memory_format=torch.channels_last)
        error = (ours.cpu() - expected).abs()[decided]
        assert error.max() <= tolerance, f"{backend}: {error.max():.2e}"


EVERYONE = torch.ones(40, dtype=torch.bool)
DRAWN = random_params(40)
ALONE = {
    "nothing": {},
    "flip": {"flip": EVERYONE},
    "brightness": {"jitter": EVERYONE, "brightness": DRAWN.brightness},
    "contrast": {"jitter": EVERYONE, "contrast": DRAWN.contrast},
    "saturation": {"jitter": EVERYONE, "saturation": DRAWN.saturation},
    "hue": {"jitter": EVERYONE, "hue": DRAWN.hue},
    "grayscale": {"grayscale": EVERYONE},
    "blur": {"blur_sigma": torch.linspace(0.1, 2.0, 40)},
    "solarize": {"solarize": EVERYONE},
}


@pytest.mark.parametrize("size", [32, 96, 45])
@pytest.mark.parametrize("name", ALONE)
def test_each_operation_alone(name: str, size: int) -> None:
    params = PhotometricParams.identity(40)
    for field, value in ALONE[name].items():
        setattr(params, field, value)
    params.blur_kernel = 2 * (size // 20) + 1
    check(crops(40, size), params)


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (96, 9), (45, 23)])
def test_random_chains(size: int, kernel: int) -> None:
    check(crops(100, size), random_params(100, kernel, seed=size))


@pytest.mark.parametrize(("height", "width", "kernel"), [(13, 17, 23), (40, 24, 23), (64, 50, 3), (33, 70, 63)])
def test_every_order_of_the_jitter(height: int, width: int, kernel: int) -> None:
    kernel = min(kernel, 2 * min(height, width) - 1)
    check(drawn_images(48, height, width), every_order(48, kernel, seed=height))


@pytest.mark.parametrize("kernel", [1, 3, 23])
def test_extremes(kernel: int) -> None:
    params = extremes(kernel)
    check(drawn_images(len(params), 37, 29), params)


def test_threshold_and_rectangles() -> None:
    images = crops(40, 45)[:, :20].contiguous()
    params = random_params(40, 9)
    params.solarize, params.solarize_threshold = EVERYONE, 0.3
    check(images, params)


@pytest.mark.parametrize("backend", ["tiled", "reference"])
def test_normalisation_and_dtypes(backend: str) -> None:
    images, params = crops(40, 32), random_params(40)
    params.solarize = ~EVERYONE
    ours = photometric(images, params, **IMAGENET, backend=backend)
    assert torch.allclose(ours, torchvision_views(images, params, **IMAGENET), atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        low = photometric(images, params, **IMAGENET, out_dtype=dtype, backend=backend)
        assert low.dtype == dtype
        assert low.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(low, ours.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(photometric(images, params, **IMAGENET, backend=backend), ours)


@pytest.mark.parametrize("std", [1e4, 1e6, 1e8, 1e-4, 1e-6])
def test_rounding_at_the_ends_of_16_bits(std: float) -> None:
    images, params = drawn_images(8, 20, 33), random_params(8)
    stretch = {"mean": (0.5, 0.0, 0.25), "std": (std, std / 3, std / 7)}
    ours = photometric(images, params, **stretch)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(photometric(images, params, **stretch, out_dtype=dtype), ours.to(dtype))


def test_samples_do_not_see_each_other() -> None:
    images, params = crops(40, 32), random_params(40)
    before = images.clone()
    whole = photometric(images, params, **PLAIN)
    assert torch.equal(images, before)
    some = torch.tensor([30, 3, 17, 4])
    assert torch.allclose(photometric(images[some], params.select(some), **PLAIN), whole[some], atol=1e-6)
    two = photometric(images[3:5], params.select(slice(3, 5)), **PLAIN)
    assert torch.allclose(two, whole[3:5], atol=1e-6)
    halves = PhotometricParams.cat([params.select(slice(0, 11)), params.select(slice(11, 40))])
    assert len(halves) == 40
    assert torch.equal(photometric(images, halves.to("cpu"), **PLAIN), whole)
    assert photometric(images[:0], params.select(slice(0, 0)), **PLAIN).shape == (0, 3, 32, 32)


def test_other_samples_and_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    images, params = crops(40, 45), random_params(40, 23)
    whole = photometric(images, params, **PLAIN)
    for one in (0, 7, 21):
        alone = photometric(images[one : one + 1], params.select(slice(one, one + 1)), **PLAIN)
        assert torch.equal(alone[0], whole[one])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(photometric(images, params, **PLAIN), whole)


def test_any_strides_and_one_pixel() -> None:
    images, params = drawn_images(40, 20, 45), random_params(40, 9)
    whole = photometric(images, params, **PLAIN)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(photometric(planar, params, **PLAIN), whole)
    params = random_params(40, 3)
    for row in (images[:, :1], images[:, :, :1], images[:, :1, :1]):
        expected = photometric(row, params, **PLAIN, backend="reference")
        assert torch.allclose(photometric(row, params, **PLAIN), expected, atol=5e-6)


def test_blur_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images, params = crops(40, 32), random_params(40)
    whole = photometric(images, params, **PLAIN, backend="reference")
    monkeypatch.setattr(photometric_reference, "_BLUR_BYTES", 1)
    assert torch.allclose(photometric(images, params, **PLAIN, backend="reference"), whole, atol=1e-6)


def test_refusals() -> None:
    images, params = crops(40, 32), random_params(40)
    call = partial(photometric, **PLAIN)
    with pytest.raises(ValueError, match="auto, triton, tiled, reference"):
        call(images, params, backend="cuda")
    with pytest.raises(ValueError, match="crops"):
        call(images.float(), params)
    with pytest.raises(ValueError, match="40 samples for 3 crops"):
        call(images[:3], params)
    with pytest.raises(ValueError, match="three channels"):
        photometric(images, params, mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="reaches beyond"):
        call(images[:, :8], random_params(40, 23))
    with pytest.raises(ValueError, match="odd"):
        call(images, random_params(40, 4))
    with pytest.raises(ValueError, match="at least one pixel"):
        call(images[:, :0], params)
    with pytest.raises(ValueError, match="std above 0"):
        photometric(images, params, mean=(0.5,) * 3, std=(0.5, 0.0, 0.5))
    with pytest.raises(ValueError, match="out_dtype"):
        call(images, params, out_dtype=torch.float64)
    with pytest.raises(ValueError, match="blur_kernel differs"):
        PhotometricParams.cat([params, random_params(40, 9)])
    with pytest.raises(ValueError, match="at least one"):
        PhotometricParams.cat([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hue": torch.full((40,), 0.6)}, "params.hue: expected numbers from -0.5 to 0.5, got 0.0 to 0.6"),
        ({"brightness": torch.full((40,), -1.0)}, "params.brightness: expected numbers finite, from 0.0 up"),
        ({"saturation": torch.full((40,), float("nan"))}, "params.saturation"),
        ({"blur_sigma": torch.full((40,), -1.0)}, "params.blur_sigma"),
        ({"order": torch.zeros(40, 4, dtype=torch.int64)}, "params.order: expected a permutation"),
        ({"order": torch.zeros(40, 3, dtype=torch.int64)}, r"params.order: expected \[40, 4\] int64, got \[40, 3\]"),
        ({"grayscale": torch.zeros(40)}, r"params.grayscale: expected \[40\] bool, got \[40\] float32"),
        ({"contrast": torch.ones(39)}, r"params.contrast: expected \[40\] float32, got \[39\]"),
        ({"solarize_threshold": 1.5}, "solarize_threshold: expected a number in"),
    ],
)
def test_refusals_of_parameters(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        photometric(crops(40, 32), replace(random_params(40), **change), **PLAIN)
    if "order" in change or "hue" in change:  # which mean nothing here
        idle = replace(random_params(40), jitter=~EVERYONE, **change)
        if idle.order.shape == (40, 4):
            photometric(crops(40, 32), idle, **PLAIN)
