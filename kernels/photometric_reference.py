"""`photometric` in plain PyTorch, on any device: what the compiled kernels are compared with."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from kernels.photometric import ORDERS, PhotometricParams
from kernels.transfer import to_device

_GRAY = (0.2989, 0.587, 0.114)  # torchvision's weights (their sum is 0.9999)
_BLUR_BYTES = 64 * 2**20  # temporaries of the blur


def reference(crops: Tensor, params: PhotometricParams, affine: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Planes [B, 3, H, W] in float32, changed in place. Samples are first sorted by the order of their
    jitter, so that each of the 24 orders works on one contiguous slice, which costs no copies."""
    device = crops.device
    kinds = torch.where(params.jitter, _order_index(params.order), len(ORDERS))
    jittered = bool(params.jitter.any())
    if jittered:
        sorting = torch.argsort(kinds, stable=True)
        params, crops = params.select(sorting), crops.index_select(0, to_device(sorting, device))

    x = crops.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
    _on_subset(x, params.flip, lambda part, _: part.flip(-1))
    if jittered:
        factors = (params.brightness, params.contrast, params.saturation, params.hue)
        idle = [bool((factor == neutral).all()) for factor, neutral in zip(factors, (1, 1, 1, 0), strict=True)]
        moved = to_device(torch.stack(factors), device)
        counts = torch.bincount(kinds, minlength=len(ORDERS) + 1).tolist()
        start = 0
        for order, count in zip(ORDERS, counts, strict=False):
            for operation in order if count else ():
                if not idle[operation]:
                    part = slice(start, start + count)
                    _JITTER[operation](x[part], moved[operation, part].view(-1, 1, 1))
            start += count
    _on_subset(x, params.grayscale, lambda part, _: _gray(part).unsqueeze(1).expand_as(part))
    blurred = params.blur_sigma > 0
    if bool(blurred.any()):
        sigma = to_device(params.blur_sigma, device)
        step = max(1, _BLUR_BYTES // (4 * (2 * x[0].numel() + 4 * x.shape[2] ** 2 + x.shape[3] ** 2)))
        _on_subset(x, blurred, lambda part, at: _blur(part, sigma[at], params.blur_kernel), step)
    threshold = params.solarize_threshold
    _on_subset(x, params.solarize, lambda part, _: torch.where(part >= threshold, 1 - part, part))

    # One multiply-add: x / std - mean / std.
    scale, shift = to_device(affine, device).view(3, 2, 1, 1).unbind(1)
    x = torch.addcmul(shift, x, scale)
    x = x.to(out_dtype, memory_format=torch.channels_last)
    if jittered:
        back = to_device(torch.argsort(sorting), device)
        x = x.permute(0, 2, 3, 1).index_select(0, back).permute(0, 3, 1, 2)
    return x


def _order_index(order: Tensor) -> Tensor:
    """[B] int64: the place in ORDERS of each [B, 4] permutation."""
    digits = torch.tensor([64, 16, 4, 1])
    table = torch.zeros(256, dtype=torch.int64)
    table[(torch.tensor(ORDERS) * digits).sum(1)] = torch.arange(len(ORDERS))
    return table[(order * digits).sum(1)]


def _on_subset(x: Tensor, mask: Tensor, change: Callable[[Tensor, Tensor], Tensor], step: int | None = None) -> None:
    """Replaces the samples of `x` in `mask` ([B] bool, CPU) by change(samples, their indices on the
    device)."""
    indices = mask.nonzero().squeeze(1)
    if len(indices) == 0:
        return
    for part in indices.split(step or len(indices)):
        at = to_device(part, x.device)
        x.index_copy_(0, at, change(x.index_select(0, at), at))


def _gray(x: Tensor) -> Tensor:
    """[b, 3, H, W] -> [b, H, W]."""
    red, green, blue = x.unbind(1)
    return (red * _GRAY[0]).add_(green, alpha=_GRAY[1]).add_(blue, alpha=_GRAY[2])


def _brightness(x: Tensor, factor: Tensor) -> None:
    x.mul_(factor[:, None]).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> None:
    mean = _gray(x).mean((1, 2)).view(-1, 1, 1)
    x.mul_(factor[:, None]).add_(((1 - factor) * mean)[:, None]).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> None:
    gray = _gray(x).mul_(1 - factor)
    x.mul_(factor[:, None]).add_(gray[:, None]).clamp_(0, 1)


def _hue(x: Tensor, factor: Tensor) -> None:
    """Through HSV without writing S and V out: with M and m the largest and smallest channel and h the hue in
    sixths of a turn, red, green and blue are M - (M - m) * clamp(min(k, 4 - k), 0, 1) at k = (h + 5, 3, 1)
    mod 6."""
    red, green, blue = x.unbind(1)
    minimum, maximum = torch.aminmax(x, dim=1)
    chroma = maximum - minimum
    divisor = chroma.clamp(min=1e-12)  # where it acts, all three differences are zero
    sixths = torch.where(maximum == green, (blue - red).div_(divisor).add_(2), (red - green).div_(divisor).add_(4))
    sixths = torch.where(maximum == red, (green - blue).div_(divisor), sixths).add_(6 * factor)
    for channel, offset in zip((red, green, blue), (5, 3, 1), strict=True):
        k = (sixths + offset).remainder_(6)
        ramp = torch.minimum(k, 4 - k).clamp_(0, 1)
        torch.addcmul(maximum, chroma, ramp, value=-1, out=channel)


_JITTER = (_brightness, _contrast, _saturation, _hue)


def _blur(x: Tensor, sigma: Tensor, kernel: int) -> Tensor:
    """Gaussian blur of [b, 3, H, W] with sigma [b] as two batched products with banded matrices: reflection
    is folded into the bands, and every sample may have its own sigma."""
    half = kernel // 2
    offset = torch.arange(-half, half + 1, device=x.device, dtype=torch.float32)
    weights = torch.softmax(-0.5 * (offset / sigma[:, None]).square(), dim=1)  # [b, kernel]
    batch, _, height, width = x.shape
    rows = (weights @ _reflections(height, kernel, x.device)).view(batch, 1, height, height)
    columns = (weights @ _reflections(width, kernel, x.device)).view(batch, width, width)
    return rows @ (x.flatten(1, 2) @ columns.transpose(1, 2)).view_as(x)


@lru_cache(maxsize=8)
def _reflections(extent: int, kernel: int, device: torch.device) -> Tensor:
    """[kernel, extent * extent] float32: for each tap, the 0/1 matrix from pixels to the outputs they
    reach."""
    half = kernel // 2
    target = torch.arange(extent)
    source = (target + torch.arange(-half, half + 1)[:, None]).abs()  # [kernel, extent], mirrored at the first pixel
    source = torch.minimum(source, 2 * (extent - 1) - source)  # and at the last
    matrices = torch.zeros(kernel, extent, extent)
    matrices[torch.arange(kernel)[:, None], target, source] = 1.0
    return matrices.view(kernel, -1).to(device)
