"""Each photometric operation, and whole random chains, against torchvision.transforms.v2.functional in
float32."""

import importlib
from functools import cache, partial

import pytest
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torchvision.transforms.v2 import functional

from kernels import PhotometricParams, photometric

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


def check(images: Tensor, params: PhotometricParams, exact: bool = True) -> None:
    ours = photometric(images, params, **PLAIN)
    error = (ours - torchvision_views(images, params, **PLAIN)).abs() * 255
    assert ours.shape == (len(images), 3, *images.shape[1:3])
    assert ours.is_contiguous(memory_format=torch.channels_last)
    # Solarising is a jump: a value within rounding of the threshold may fall on its other side.
    assert error.max() <= 0.01 if exact else (error > 1.5).float().mean() < 1e-4
    assert error.mean() <= 0.001


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
    check(crops(200, size), random_params(200, kernel, seed=size), exact=False)


def test_chains_that_do_not_solarise_agree_closely() -> None:
    params = random_params(200, seed=5)
    params.solarize = torch.zeros(200, dtype=torch.bool)
    check(crops(200, 32), params)


def test_threshold_and_rectangles() -> None:
    images = crops(40, 45)[:, :20].contiguous()
    params = random_params(40, 9)
    params.solarize, params.solarize_threshold = EVERYONE, 0.3
    check(images, params, exact=False)


def test_normalisation_and_dtypes() -> None:
    images, params = crops(40, 32), random_params(40)
    params.solarize = ~EVERYONE
    ours = photometric(images, params, **IMAGENET)
    assert torch.allclose(ours, torchvision_views(images, params, **IMAGENET), atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        low = photometric(images, params, **IMAGENET, out_dtype=dtype)
        assert low.dtype == dtype
        assert low.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(low, ours.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(photometric(images, params, **IMAGENET), ours)


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


def test_blur_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    images, params = crops(40, 32), random_params(40)
    whole = photometric(images, params, **PLAIN)
    # By name, since the package's attribute `photometric` is the function.
    monkeypatch.setattr(importlib.import_module("kernels.photometric"), "_BLUR_BYTES", 1)
    assert torch.allclose(photometric(images, params, **PLAIN), whole, atol=1e-6)


def test_refusals() -> None:
    images, params = crops(40, 32), random_params(40)
    call = partial(photometric, **PLAIN)
    with pytest.raises(ValueError, match="auto, reference"):
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
    with pytest.raises(ValueError, match="blur_kernel differs"):
        PhotometricParams.cat([params, random_params(40, 9)])
    with pytest.raises(ValueError, match="at least one"):
        PhotometricParams.cat([])


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    images, params = crops(200, 96), random_params(200, 9)
    params.solarize = torch.zeros(200, dtype=torch.bool)
    expected = photometric(images, params, **PLAIN)
    for given in (params, params.to("cuda")):
        ours = photometric(images.cuda(), given, **PLAIN)
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert (ours.cpu() - expected).abs().max() <= 1.5 / 255
        assert (ours.cpu() - expected).abs().mean() <= 0.5 / 255
