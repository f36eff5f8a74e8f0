"""The other representations against plain loops over pixels and against SciPy."""

import math

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from trainers.parts.representations import NAMES, chunks, least_size, represent
from trainers.parts.representations.gradients import oriented_gradients
from trainers.parts.representations.scattering import scattering


def images(height: int = 13, width: int = 18, count: int = 3) -> Tensor:
    """Smooth enough for flat regions and edges of all directions."""
    noise = torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise[0, :, :6, :6] = 0.7
    return noise


def representation(name: str, of: Tensor) -> np.ndarray:
    return represent([name], of, lambda: of)[name].numpy()


def gradients_by_pixel(plane: np.ndarray, seed_bins: bool) -> np.ndarray:
    """[24, H/8, W/8] of one channel [H, W]."""
    height, width = plane.shape
    cells = np.zeros((24, math.ceil(height / 8), math.ceil(width / 8)))
    counts = np.zeros(cells.shape[1:])

    def at(i: int, j: int) -> float:
        return plane[min(max(i, 0), height - 1), min(max(j, 0), width - 1)]

    for i in range(height):
        for j in range(width):
            gx = sum(weight * (at(i + d, j + 1) - at(i + d, j - 1)) for d, weight in ((-1, 1), (0, 2), (1, 1)))
            gy = sum(weight * (at(i + 1, j + d) - at(i - 1, j + d)) for d, weight in ((-1, 1), (0, 2), (1, 1)))
            magnitude, position = math.hypot(gx, gy), math.atan2(gx, gy) / math.pi * 24
            lower, cell = math.floor(position), (i // 8, j // 8)
            counts[cell] += 1
            if seed_bins:
                cells[lower % 24, *cell] += magnitude
                cells[math.ceil(position) % 24, *cell] += 1 - magnitude
            else:
                cells[lower % 24, *cell] += magnitude * (1 - (position - lower))
                cells[(lower + 1) % 24, *cell] += magnitude * (position - lower)
    return cells / counts


@pytest.mark.parametrize("seed_bins", [False, True])
def test_oriented_gradients(seed_bins):
    x = images()
    expected = [[gradients_by_pixel(plane, seed_bins) for plane in image] for image in x.numpy()]
    found = represent(["hog"], x, lambda: x, seed_bins=seed_bins)["hog"].numpy()
    assert np.abs(found - np.array(expected).reshape(len(x), -1)).max() < 1e-12


def test_oriented_gradients_turn_smoothly_and_do_not_tell_light_from_dark():
    angle = torch.linspace(0, math.pi, 4001, dtype=torch.float64)
    y, x = torch.meshgrid(*2 * [torch.arange(8, dtype=torch.float64)], indexing="ij")
    ramps = angle.cos()[:, None, None] * y + angle.sin()[:, None, None] * x
    found = oriented_gradients(ramps[:, None].expand(-1, 3, -1, -1)).flatten(1)
    assert (found[1:] - found[:-1]).abs().max() < 0.1  # of magnitudes of 8; a bin is passed in 167 steps
    assert (found[0] - found[-1]).abs().max() < 1e-9
    assert (oriented_gradients(-ramps[:9, None]) - oriented_gradients(ramps[:9, None])).abs().max() < 1e-9


def test_local_deviation():
    x = images()
    expected = np.zeros(x.shape)
    for n, channel, i, j in np.ndindex(*x.shape):
        box = x[n, channel, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].numpy()
        expected[n, channel, i, j] = math.sqrt(box.var() + 1e-8)
    assert np.abs(representation("local_std", x) - expected.reshape(len(x), -1)).max() < 1e-7
    flat = torch.full((1, 3, 9, 9), 2.1)
    assert np.allclose(representation("local_std", flat), 1e-4, rtol=1e-3)  # in float32 as well


def test_cosines_are_scipys():
    x = images()
    expected = scipy.fft.dctn(x.numpy(), type=2, axes=(2, 3))
    assert np.abs(representation("dct", x) - expected.reshape(len(x), -1)).max() < 1e-10


def test_patches_are_scattered_by_themselves():
    x = images(23, 32)
    patches = [x[:, :, 5 * i : 5 * i + 5, 8 * j : 8 * j + 8] for i in range(4) for j in range(4)]
    expected = torch.stack([scattering(patch.contiguous()) for patch in patches], dim=1)
    assert expected.shape[3:] == (81, 1, 2)
    assert np.abs(representation("patch_scattering", x) - expected.flatten(1).numpy()).max() < 1e-12


def test_augmented_forms_are_of_other_images_made_once():
    x, other, calls = images(16, 16), images(16, 16).flip(-1), []

    def augment() -> Tensor:
        calls.append(1)
        return other.float()  # as they come

    found = represent(NAMES, x, augment)
    assert calls == [1]
    of_other = represent(NAMES, other.float().double(), lambda: other)
    for name, rows in found.items():
        assert rows.shape[0] == len(x)
        assert rows.dim() == 2
        if name.startswith("augmented_"):
            assert torch.equal(rows, of_other[name.removeprefix("augmented_")])
    represent(["pixels", "hog"], x, augment)
    assert calls == [1]


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("augmented_")])
def test_precision_memory_format_autocast_and_chunks(name, monkeypatch):
    x = images(17, 16)
    exact = representation(name, x)
    for given in (x.float(), x.float().to(memory_format=torch.channels_last)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = represent([name], given.requires_grad_(), lambda: x)[name]
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert np.abs(found.numpy() - exact).max() < 1e-5 * np.abs(exact).max()
    assert represent([name], x.bfloat16(), lambda: x)[name].dtype == torch.float32
    monkeypatch.setattr(chunks, "_ON_CPU", 1)
    assert np.abs(representation(name, x) - exact).max() < 1e-12 * np.abs(exact).max()


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_images(name):
    x = images(least_size(name), least_size(name))
    assert np.isfinite(representation(name, x)).all()
    if least_size(name) > 1:
        with pytest.raises(ValueError, match="needs images of 4 pixels"):
            representation(name, x[..., :-1])
