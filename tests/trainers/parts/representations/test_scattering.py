"""Scattering against kymatio, against the definition in plain sums, and where it is known what must come out."""

import importlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from trainers.parts.representations import chunks
from trainers.parts.representations.scattering import scattering


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.fixture
def kymatio(monkeypatch):
    """Its numpy front end. It imports a function, for molecules, that SciPy 1.17 has no more."""
    pytest.importorskip("kymatio", reason="kymatio is not installed (pip install kymatio)", exc_type=ImportError)
    monkeypatch.setattr("scipy.special.sph_harm", None, raising=False)
    return importlib.import_module("kymatio.numpy").Scattering2D


@pytest.mark.parametrize(
    ("scales", "angles", "height", "width"),
    [(2, 8, 32, 32), (2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 30, 45), (1, 4, 16, 12), (3, 6, 40, 33), (2, 5, 17, 18)],
)
def test_equals_kymatio(kymatio, scales, angles, height, width):
    x = images(2, 3, height, width)
    expected = torch.from_numpy(kymatio(scales, (height, width), angles)(x.numpy()))
    first, second = scales * angles, angles**2 * scales * (scales - 1) // 2
    order = torch.tensor([0] + [1] * first + [2] * second)
    # A path of order m ends in the (m + 1)st Gaussian, and in their constants kymatio writes 3.1415 for pi.
    expected *= ((3.1415 / math.pi) ** (order + 1))[:, None, None]
    assert scattering(x, scales, angles).shape == expected.shape
    largest = expected.abs().amax()
    assert (scattering(x, scales, angles) - expected).abs().amax() < 1e-6 * largest
    assert (scattering(x.float(), scales, angles) - expected).abs().amax() < 2e-6 * largest


def test_one_scale_is_its_definition():
    """|x * ψ| * φ at every second pixel, each convolution a plain sum over a periodic image."""
    side, angles = 8, 2  # and 8 more pixels of mirror image: 12 in all, of which the outermost are cut off
    x = images(1, 1, side, side)
    padded = np.pad(x[0, 0].numpy(), 2, mode="reflect")
    n = len(padded)
    y, z = np.mgrid[-2 * n : 3 * n, -2 * n : 3 * n]  # tails reach into the neighbouring periods

    def periodic(picture: np.ndarray) -> np.ndarray:
        return picture.reshape(5, n, 5, n).sum((0, 2))

    def convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        shifts = [np.roll(image, (i, j), (0, 1)) * kernel[i, j] for i in range(n) for j in range(n)]
        return np.sum(shifts, axis=0)

    sigma, frequency, slant = 0.8, 0.75 * np.pi, 4 / angles
    low_pass = periodic(np.exp(-(y**2 + z**2) / (2 * sigma**2)) / (2 * np.pi * sigma**2))
    expected = [convolved(padded, low_pass)]
    for angle in (0.0, -np.pi / 2):
        along, across = np.cos(angle) * y + np.sin(angle) * z, np.cos(angle) * z - np.sin(angle) * y
        gaussian = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2)) * slant / (2 * np.pi * sigma**2)
        wave, envelope = periodic(gaussian * np.exp(1j * frequency * along)), periodic(gaussian)
        wavelet = wave - wave.sum() / envelope.sum() * envelope
        expected.append(convolved(np.abs(convolved(padded, wavelet)), low_pass))
    found = scattering(x, scales=1, angles=angles)[0, 0].numpy()
    assert np.abs(found - np.stack(expected)[:, ::2, ::2][:, 1:-1, 1:-1]).max() < 1e-12


def test_a_constant_image_has_a_mean_and_nothing_else():
    found = scattering(torch.full((1, 1, 20, 12), 3.0, dtype=torch.float64))[0, 0]
    assert found.shape == (81, 5, 3)
    assert (found[0] - 3).abs().max() < 1e-3  # the Gaussian's samples do not add up to 1 exactly
    assert found[1:].abs().max() < 1e-12


def test_stripes_are_seen_by_the_wavelet_across_them():
    stripes = torch.cos(0.75 * math.pi * torch.arange(32.0)).expand(1, 1, 32, 32)
    of_angles = scattering(stripes)[0, 0, 1:9, 2:-2, 2:-2].mean((1, 2))  # the finest scale
    upright = torch.cos(0.75 * math.pi * torch.arange(32.0))[:, None].expand(1, 1, 32, 32)
    of_upright = scattering(upright)[0, 0, 1:9, 2:-2, 2:-2].mean((1, 2))
    assert (of_angles.argmax() - of_upright.argmax()) % 8 == 4
    assert of_angles.max() > 5 * of_angles.median()


def test_chunks_change_nothing(monkeypatch):
    x = images(5, 3, 16, 20)
    whole = scattering(x)
    monkeypatch.setattr(chunks, "_ON_CPU", 1)
    assert (scattering(x) - whole).abs().max() < 1e-12


def test_images_that_are_too_small_are_refused():
    with pytest.raises(ValueError, match="4 pixels, got 3 x 9"):
        scattering(torch.zeros(1, 3, 3, 9))
