"""Flip, colour jitter, grayscale, blur, solarise and normalise: a batch of crops, parameters per sample.

Every operation is that of torchvision.transforms.v2.functional on float32 images in [0, 1], clamping
included. The parameters are best kept on the CPU: which samples need what is decided there, so nothing waits for
the device, and an operation that no sample asks for costs nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from kernels.backends import choose_backend
from kernels.transfer import to_device

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_NOTHING = 4
ORDERS = tuple(permutations(range(4)))  # the 24 orders of the colour jitter
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(slots=True)
class PhotometricParams:
    """What is done to each of B samples. Drawn by `pipelines.views.draw_photometric`; best on the CPU."""

    flip: Tensor  # [B] bool: mirror left to right
    jitter: Tensor  # [B] bool: where False, order and the four factors mean nothing
    order: Tensor  # [B, 4] int64, a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue
    brightness: Tensor  # [B] float32 from 0, 1 changes nothing
    contrast: Tensor  # [B] float32 from 0, 1 changes nothing
    saturation: Tensor  # [B] float32 from 0, 1 changes nothing
    hue: Tensor  # [B] float32 in [-0.5, 0.5] turns of the colour circle, 0 changes nothing
    grayscale: Tensor  # [B] bool
    blur_sigma: Tensor  # [B] float32, pixels; 0: no blur
    solarize: Tensor  # [B] bool
    blur_kernel: int = 3  # odd, pixels
    solarize_threshold: float = 0.5  # in [0, 1]; from here up a value is inverted

    @classmethod
    def identity(cls, batch: int) -> "PhotometricParams":
        """Normalise only: what an evaluation does to `batch` samples."""
        no, one = torch.zeros(batch, dtype=torch.bool), torch.ones(batch)
        order = torch.arange(4).repeat(batch, 1)
        return cls(no, no, order, one, one, one, torch.zeros(batch), no, torch.zeros(batch), no)

    def __len__(self) -> int:
        return len(self.flip)

    def to(self, device: torch.device | str) -> "PhotometricParams":
        return self._map(lambda t: to_device(t, device))

    def select(self, index: Tensor | slice) -> "PhotometricParams":
        """The samples that `index` names ([M] int64, [B] bool or a slice)."""
        return self._map(lambda t: t[index])

    @classmethod
    def cat(cls, parts: Sequence["PhotometricParams"]) -> "PhotometricParams":
        """One after the other, as torch.cat.

        Raises:
            ValueError: without parts, or where blur_kernel or solarize_threshold differ (one a call).
        """
        if not parts:
            raise ValueError("PhotometricParams.cat: expected at least one part")
        for name in ("blur_kernel", "solarize_threshold"):
            values = {getattr(part, name) for part in parts}
            if len(values) > 1:
                raise ValueError(f"PhotometricParams.cat: {name} differs, {sorted(values)}: use one call for each")
        joined: dict[str, Any] = {n: torch.cat([getattr(part, n) for part in parts]) for n in _TENSORS}
        return replace(parts[0], **joined)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PhotometricParams":
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in _TENSORS}
        return replace(self, **changed)


_TENSORS = [field.name for field in fields(PhotometricParams) if field.type in (Tensor, "Tensor")]
_RANGES = {
    "brightness": (0.0, math.inf),
    "contrast": (0.0, math.inf),
    "saturation": (0.0, math.inf),
    "hue": (-0.5, 0.5),
    "blur_sigma": (0.0, math.inf),
}


def photometric(
    crops: Tensor,
    params: PhotometricParams,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    out_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Turns uint8 crops into normalised views.

    Args:
        crops: [B, H, W, 3] uint8; not changed.
        params: of B samples, best on the CPU. Elsewhere "triton" reserves memory as if all were blurred, and the
            other backends wait for the device that holds them.
        mean, std: of the three channels, of values in [0, 1].
        out_dtype: float32, bfloat16 or float16; the arithmetic is float32 always, under autocast too.
        backend: "triton" (fused, CUDA), "tiled" (compiled by numba on a CPU, elsewhere the reference),
            "reference" (plain PyTorch on any device) or "auto", the fastest on the device.

    Returns:
        [B, 3, H, W] in channels_last memory, on the device of `crops`.

    Raises:
        ValueError: for a wrong shape, dtype, number of parameters, blur kernel or backend and, where the
            parameters lie on the CPU, for values out of range.
    """
    _check(crops, params, mean, std, out_dtype)
    chosen = choose_backend(backend, crops)
    on_cpu = crops.device.type == "cpu"
    affine = torch.tensor([[1 / s, -m / s] for m, s in zip(mean, std, strict=True)], dtype=torch.float32)
    with torch.no_grad(), torch.autocast(crops.device.type, enabled=False):
        if chosen == "reference" or (chosen == "tiled" and not on_cpu):
            from kernels.photometric_reference import reference

            return reference(crops, params.to("cpu"), affine, out_dtype)
        out = torch.empty(crops.shape, dtype=out_dtype, device=crops.device)
        if chosen == "triton" and len(crops):
            from kernels.fused import photometric as fused

            fused.render(crops.contiguous(), pack(params), affine, out)
        elif len(crops):
            from kernels import photometric_cpu

            photometric_cpu.render(crops.contiguous(), pack(params.to("cpu")), affine, out)
    return out.permute(0, 3, 1, 2)


def pack(params: PhotometricParams) -> Tensor:
    """[B, 15] float32 on the device of `params`: all that a compiled kernel wants to know of a sample.

    Columns: 0 flip; 1 how many steps come before contrast (5: there is no contrast); 2-6 the operations, which are
    the jitter's in their order and, for grayscale, a saturation of 0 (4: nothing); 7-11 their factors; 12 the
    threshold of solarising, or infinity; 13 the blur's sigma; 14 its radius, taps on either side (0: no blur).
    """
    order = params.order * params.jitter[:, None]
    factors = torch.stack((params.brightness, params.contrast, params.saturation, params.hue), 1).gather(1, order)
    neutral = order != HUE  # a factor of 1, or a shift by 0
    steps = torch.where(params.jitter[:, None] & (factors != neutral), order, _NOTHING)
    before = (steps == CONTRAST).cumsum(1).eq(0).sum(1)
    before += before == _NOTHING
    gray = torch.where(params.grayscale, SATURATION, _NOTHING)
    threshold = torch.where(params.solarize, params.solarize_threshold, math.inf)
    # All taps further out than 4.9 sigma weigh a millionth together.
    radius = (4.9 * params.blur_sigma - 0.5).ceil().clamp(0, params.blur_kernel // 2)
    columns = (params.flip, before, steps, gray, factors, 0 * radius, threshold, params.blur_sigma, radius)
    return torch.cat([c if c.ndim == 2 else c[:, None] for c in columns], 1).to(torch.float32)


def _check(
    crops: Tensor, params: PhotometricParams, mean: Sequence[float], std: Sequence[float], out_dtype: torch.dtype
) -> None:
    if crops.ndim != 4 or crops.shape[-1] != 3 or crops.dtype != torch.uint8:
        raise ValueError(f"crops: expected [B, H, W, 3] uint8, got {list(crops.shape)} {crops.dtype}")
    if 0 in crops.shape[1:3]:
        raise ValueError(f"crops: expected at least one pixel, got {list(crops.shape)}")
    if len(params) != len(crops):
        raise ValueError(f"params: {len(params)} samples for {len(crops)} crops")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean, std: expected three channels each, got {list(mean)} and {list(std)}")
    if not (all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std)):
        raise ValueError(f"mean, std: expected finite numbers, std above 0, got {list(mean)} and {list(std)}")
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype: expected one of {', '.join(map(str, OUT_DTYPES))}, got {out_dtype}")
    kernel, shortest = params.blur_kernel, min(crops.shape[1:3])
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"blur_kernel: expected an odd number of pixels, got {kernel}")
    if kernel // 2 >= max(shortest, 2):
        raise ValueError(f"blur_kernel: {kernel} reaches beyond the reflection of {shortest} pixels")
    if not 0 <= params.solarize_threshold <= 1:
        raise ValueError(f"solarize_threshold: expected a number in [0, 1], got {params.solarize_threshold}")
    for name in _TENSORS:
        tensor, shape = getattr(params, name), [len(crops), 4] if name == "order" else [len(crops)]
        wanted = "float32" if name in _RANGES else "int64" if name == "order" else "bool"
        given = str(tensor.dtype).removeprefix("torch.")
        if list(tensor.shape) != shape or (given != wanted and not (name in _RANGES and tensor.is_floating_point())):
            raise ValueError(f"params.{name}: expected {shape} {wanted}, got {list(tensor.shape)} {given}")
    # Values are looked at only where that costs no wait for a device.
    if len(crops) and all(getattr(params, name).device.type == "cpu" for name in _TENSORS):
        _check_values(params)


def _check_values(params: PhotometricParams) -> None:
    *factors, sigma = (getattr(params, name).to(torch.float32) for name in _RANGES)
    # Where there is no jitter, factors mean nothing.
    values = torch.cat([torch.stack(factors).where(params.jitter, 0.0), sigma[None]])
    least, most = values.aminmax(dim=1)
    for (name, (low, high)), a, b in zip(_RANGES.items(), least.tolist(), most.tolist(), strict=True):
        if not (low <= a and b <= high and b < math.inf):  # neither holds for NaN
            limits = f"from {low} to {high}" if high < math.inf else f"finite, from {low} up"
            raise ValueError(f"params.{name}: expected numbers {limits}, got {a} to {b}")
    order = torch.where(params.jitter[:, None], params.order, torch.arange(4)).sort(1).values
    if not torch.equal(order, torch.arange(4).expand_as(order)):
        raise ValueError("params.order: expected a permutation of 0, 1, 2, 3 for each sample whose jitter is True")
