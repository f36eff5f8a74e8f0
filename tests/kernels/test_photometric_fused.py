"""The Triton kernels against torchvision: natively where there is a GPU, else under Triton's interpreter."""

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import PhotometricParams, photometric
from tests.kernels.test_photometric import (
    IMAGENET,
    PLAIN,
    check,
    crops,
    drawn_images,
    every_order,
    extremes,
    random_params,
    torchvision_views,
)

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fused(images: Tensor, params: PhotometricParams, **options: object) -> Tensor:
    return photometric(images.to(DEVICE), params, **(PLAIN | options), backend="triton").cpu()


@pytest.mark.parametrize(("count", "height", "width", "kernel"), [(24, 13, 17, 5), (6, 40, 24, 23)])
def test_every_order_of_the_jitter(count: int, height: int, width: int, kernel: int) -> None:
    check(drawn_images(count, height, width), every_order(count, kernel, seed=height), "triton", device=DEVICE)


@pytest.mark.parametrize("kernel", [1, 3, 23])
def test_extremes(kernel: int) -> None:
    params = extremes(kernel)
    check(drawn_images(len(params), 19, 14), params, "triton", device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalisation_and_dtypes(dtype: torch.dtype) -> None:
    images, params = drawn_images(8, 12, 9), random_params(8)
    params.solarize = torch.zeros(8, dtype=torch.bool)
    ours = fused(images, params, **IMAGENET, out_dtype=dtype)
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    expected = torchvision_views(images, params, **IMAGENET)
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()  # half a step, plus what float32 differs by
    assert ((ours.float() - expected).abs() <= 1.01 * rounding + 2e-5).all()


def test_small_workspace_and_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    images, params = drawn_images(6, 10, 13), every_order(6, 3)
    params.blur_sigma = torch.tensor([0.5, 1, 0, 2, 0.1, 3])
    whole = fused(images, params)
    module = importlib.import_module("kernels.fused.photometric")
    monkeypatch.setattr(module, "_WORKSPACE_BYTES", 2 * 3 * 4 * 10 * 13 * 2)  # two samples
    assert torch.equal(fused(images, params), whole)
    monkeypatch.setattr(module, "_PART_PIXELS", 16)  # 9 parts
    assert torch.allclose(fused(images, params), whole, atol=2e-6)
    monkeypatch.setattr(module, "_PARTS", 4)
    assert torch.allclose(fused(images, params), whole, atol=2e-6)


def test_strides_and_empty_batches_and_one_pixel() -> None:
    images, params = drawn_images(4, 10, 13), random_params(4)
    planar = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(fused(planar, params), fused(images, params))
    assert fused(images[:0], params.select(slice(0, 0))).shape == (0, 3, 10, 13)
    for row in (images[:, :1], images[:, :, :1]):
        expected = photometric(row, params, **PLAIN, backend="reference")
        assert torch.allclose(fused(row, params), expected, atol=5e-6)


def test_nothing_to_do_changes_nothing() -> None:
    images = drawn_images(3, 10, 13)
    identity = PhotometricParams.identity(3)
    assert torch.equal((fused(images, identity) * 255).round().permute(0, 2, 3, 1).to(torch.uint8), images)


@pytest.mark.gpu
@pytest.mark.parametrize(("size", "kernel"), [(96, 9), (224, 23), (225, 63)])
def test_on_a_gpu(size: int, kernel: int) -> None:
    images, params = crops(200, size), random_params(200, kernel)
    check(images, params, "triton", "auto", "tiled", "reference", device="cuda")
    first = fused(images, params)
    assert torch.equal(first, fused(images, params))  # to the last bit, every time
    # Parameters that are on the device already: what to launch is then not known, the result is the same.
    assert torch.equal(first, fused(images, replace(params.to("cuda"))))
