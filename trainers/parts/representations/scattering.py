"""The 2D scattering transform (Bruna & Mallat 2013, arXiv:1203.1514): what Morlet wavelets see, and see in that again.

With x * ψ_jθ the image filtered at scale 2^j and angle θ = πl/L, and φ a Gaussian of width 2^J that every path ends in,

    S0 = x * φ    S1 = |x * ψ_jθ| * φ    S2 = ||x * ψ_jθ| * ψ_j'θ'| * φ  for j' > j,

sampled at every 2^J-th pixel. Widths, frequencies, padding and the order of the channels are those of kymatio, with
which the tests compare it. Wavelets are multiplied in the frequency domain. φ is a Gaussian and so separable: from
the modulus to what is kept of it is a small matrix a side, at a fraction of a Fourier transform's cost.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from trainers.parts.representations.chunks import in_chunks

_SIGMA, _FREQUENCY = 0.8, 3 * math.pi / 4  # of the finest wavelet: pixels, and radians a pixel; an octave less a scale
_TILES = range(-2, 3)  # a filter is periodic: its tails from so many pictures around are added


def scattering(images: Tensor, scales: int = 2, angles: int = 8) -> Tensor:
    """Scattering coefficients of orders 0, 1 and 2.

    Args:
        images: [N, C, H, W] float32 or float64; H and W at least 2^scales.
        scales: J. The last order's channels see 2^J pixels and a few more.
        angles: L, of the half turn.

    Returns:
        [N, C, 1 + J·L + L²·J(J-1)/2, H // 2^J, W // 2^J], of the dtype and on the device of `images`: 81 channels as it
        stands. First the only one of order 0, then order 1 by (j, l), then order 2 by (j, l, j', l').

    Raises:
        ValueError: images smaller than 2^scales.
    """
    height, width = images.shape[-2:]
    if min(height, width) < 2**scales:
        raise ValueError(f"scattering over {scales} octaves needs images of {2**scales} pixels, got {height} x {width}")
    bank = _filters(height, width, scales, angles, images.dtype, images.device)
    planes = images.reshape(-1, height, width)
    temporaries = 8 * angles * bank.padded[0] * bank.padded[1] * images.element_size()
    channels = in_chunks(lambda part: _scatter(part, bank, scales), planes, temporaries)
    return channels.view(*images.shape[:2], *channels.shape[1:])


class _Filters(NamedTuple):
    padded: tuple[int, int]
    mirrored: tuple[Tensor, Tensor]  # [Hp], [Wp] int64: the row and column of the image that each padded one repeats
    # At [j, r] scale j for maps sampled at every 2^r-th pixel, to be sampled at every 2^j-th, f = 2^(j-r): the real
    # spectra over f² in f x f blocks, each number twice, [f, f, L, Hp/2^j, Wp/2^j, 2].
    wavelets: dict[tuple[int, int], Tensor]
    low_pass: list[
        tuple[Tensor, Tensor]
    ]  # at [r] [H/2^J, Hp/2^r], [W/2^J, Wp/2^r]: φ, sampling and cutting off at once


def _scatter(planes: Tensor, bank: _Filters, scales: int) -> Tensor:
    """[n, H, W] -> [n, channels, H/2^J, W/2^J]."""
    rows, columns = bank.mirrored
    padded = planes[:, rows[:, None], columns]
    spectrum = torch.fft.fft2(padded)
    orders: list[list[Tensor]] = [[_smooth(padded[:, None], bank.low_pass[0])], [], []]
    for j in range(scales):
        modulus = _modulus(spectrum[:, None], bank.wavelets[j, 0])
        orders[1].append(_smooth(modulus, bank.low_pass[j]))
        if j + 1 < scales:
            of_modulus = torch.fft.fft2(modulus)[:, :, None]
            second = [
                _smooth(_modulus(of_modulus, bank.wavelets[coarser, j]), bank.low_pass[coarser])
                for coarser in range(j + 1, scales)
            ]
            orders[2].append(torch.cat(second, dim=2).flatten(1, 2))
    return torch.cat([channels for order in orders for channels in order], dim=1)


def _modulus(spectrum: Tensor, wavelets: Tensor) -> Tensor:
    """|x * ψ| at every f-th pixel: spectrum [..., 1, f·h, f·w] and wavelets [f, f, L, h, w, 2] -> [..., L, h, w] real.

    Sampling in space adds up the f² blocks of the spectrum. Products of reals with what repeats for the imaginary
    part run several times as fast as complex ones.
    """
    factor, height, width = wavelets.shape[0], *wavelets.shape[3:5]
    blocks = torch.view_as_real(spectrum).unflatten(-2, (factor, width)).unflatten(-4, (factor, height))
    blocks = blocks.movedim((-5, -3), (0, 1)).contiguous()
    product = blocks[0, 0] * wavelets[0, 0]
    for row in range(factor):
        for column in range(factor):
            if row or column:
                product.addcmul_(blocks[row, column], wavelets[row, column])
    real, imaginary = torch.view_as_real(torch.fft.ifft2(torch.view_as_complex(product))).unbind(-1)
    return real.square().addcmul_(imaginary, imaginary).sqrt_()


def _smooth(maps: Tensor, low_pass: tuple[Tensor, Tensor]) -> Tensor:
    """maps [..., h, w] -> [..., H/2^J, W/2^J]."""
    of_rows, of_columns = low_pass
    return of_rows @ (maps @ of_columns.T)


# ---- filters -------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _filters(height: int, width: int, scales: int, angles: int, dtype: torch.dtype, device: torch.device) -> _Filters:
    """Everything that does not depend on the images; made in float64."""
    stride = 2**scales
    # Both sides are padded so that the map, sampled, has a pixel to spare at each end, which is cut off.
    padded_height, padded_width = ((extent // stride + 2) * stride for extent in (height, width))
    wavelets = {}
    for j in range(scales):
        spectra = torch.stack([_wavelet(padded_height, padded_width, j, place, angles) for place in range(angles)])
        for r in range(j + 1):
            factor = 2 ** (j - r)
            blocks = _lowest(spectra, r).unflatten(2, (factor, -1)).unflatten(1, (factor, -1)).movedim((1, 3), (0, 1))
            doubled = (blocks / factor**2)[..., None].repeat_interleave(2, dim=-1)
            wavelets[j, r] = doubled.to(device, dtype).contiguous()
    low_pass = []
    for r in range(scales):
        matrices = [_low_pass(extent, scales, r).to(device, dtype) for extent in (padded_height, padded_width)]
        low_pass.append((matrices[0], matrices[1]))
    mirrored = (_mirrored(height, padded_height).to(device), _mirrored(width, padded_width).to(device))
    return _Filters((padded_height, padded_width), mirrored, wavelets, low_pass)


def _mirrored(extent: int, padded: int) -> Tensor:
    """[padded] int64: which of `extent` pixels is repeated, mirrored at the first and last as often as needed."""
    position = torch.arange(padded) - (padded - extent) // 2
    position = position.remainder(2 * (extent - 1))
    return torch.minimum(position, 2 * (extent - 1) - position)


def _wavelet(height: int, width: int, j: int, place: int, angles: int) -> Tensor:
    """The spectrum, [height, width] and real, of the Morlet wavelet of scale j: a wave under an elongated Gaussian,
    less as much of the Gaussian as makes the mean 0."""
    sigma, frequency, slant = _SIGMA * 2**j, _FREQUENCY / 2**j, 4 / angles
    angle = (angles // 2 - 1 - place) * math.pi / angles
    y, x = _coordinates(height)[:, None], _coordinates(width)
    along, across = math.cos(angle) * y + math.sin(angle) * x, math.cos(angle) * x - math.sin(angle) * y
    gaussian = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2)) * slant / (2 * math.pi * sigma**2)
    wave = gaussian * torch.exp(1j * frequency * along)
    gaussian, wave = (_folded(_folded(picture, 0), 1) for picture in (gaussian, wave))
    return torch.fft.fft2(wave - wave.sum() / gaussian.sum() * gaussian).real


def _low_pass(padded: int, scales: int, r: int) -> Tensor:
    """[padded/2^J - 2, padded/2^r]: φ along one axis, on maps sampled at every 2^r-th pixel, at what is kept of it."""
    sigma = _SIGMA * 2 ** (scales - 1)
    gaussian = torch.exp(-(_coordinates(padded) ** 2) / (2 * sigma**2)) / math.sqrt(2 * math.pi * sigma**2)
    spectrum = torch.fft.fft(_folded(gaussian, 0))
    filtered = torch.fft.fft(torch.eye(padded // 2**r, dtype=torch.float64), dim=0) * _lowest(spectrum, r, 1)[:, None]
    return torch.fft.ifft(filtered, dim=0).real[:: 2 ** (scales - r)][1:-1]


def _coordinates(extent: int) -> Tensor:
    """Pixels of a picture and of those around it, [5 * extent] float64."""
    return torch.arange(_TILES.start * extent, _TILES.stop * extent, dtype=torch.float64)


def _folded(picture: Tensor, dim: int) -> Tensor:
    """The pictures around, added to the one in the middle."""
    return picture.unflatten(dim, (len(_TILES), -1)).sum(dim)


def _lowest(spectra: Tensor, r: int, dims: int = 2) -> Tensor:
    """What lies below 1/2^r of the highest frequency, in each of the last `dims` dimensions."""
    for dim in range(-dims, 0) if r else ():
        extent = spectra.shape[dim]
        half = extent // 2 ** (r + 1)
        kept = torch.cat([torch.arange(half), torch.arange(extent - (extent // 2**r - half), extent)])
        spectra = spectra.index_select(dim, kept)
    return spectra
