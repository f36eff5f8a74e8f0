"""Hand-crafted representations of images: what MV-MR's embeddings are made to depend on.

Each is a function of normalised images [N, 3, H, W] that gives [N, p], in float32 (float64 for float64 images), with no
gradient and nothing learned, on any device. Recipes call them by the names below; `augmented_…` is the same of the
images augmented once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.parts.representations.chunks import in_chunks
from trainers.parts.representations.gradients import oriented_gradients
from trainers.parts.representations.scattering import scattering

_AUGMENTED = "augmented_"
_STD_FLOOR = 1e-8  # added to the variance, as the method's authors do
_PATCHES = 4  # a side


def represent(
    names: Iterable[str], images: Tensor, augment: Callable[[], Tensor], *, seed_bins: bool = False
) -> dict[str, Tensor]:
    """The representations of a batch.

    Args:
        names: from `NAMES`.
        images: [N, 3, H, W] normalised, any floating-point dtype.
        augment: gives the same images augmented once more, as `images`; called once, if a name asks for it.
        seed_bins: see `oriented_gradients`.

    Returns:
        name -> [N, p], float32, or float64 if images are.
    """
    functions = dict(_FUNCTIONS)
    if seed_bins:
        functions["hog"] = lambda pixels: oriented_gradients(pixels, seed_bins=True)
    names = list(names)
    found: dict[str, Tensor] = {}
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        plain = images.detach().to(_working_dtype(images))
        again = augment().to(plain.dtype) if any(name.startswith(_AUGMENTED) for name in names) else plain
        for name in names:
            function = functions[name.removeprefix(_AUGMENTED)]
            found[name] = function(again if name.startswith(_AUGMENTED) else plain).flatten(1)
    return found


def least_size(name: str) -> int:
    """The side of the smallest images that have this representation, in pixels."""
    return {"scattering": 4, "patch_scattering": 4 * _PATCHES}.get(name.removeprefix(_AUGMENTED), 1)


def discrete_cosines(images: Tensor) -> Tensor:
    """The two-dimensional DCT-II, [N, C, H, W] -> the same shape, scaled as `scipy.fft.dctn` scales it by default.

    Scaled to be orthonormal it would be a turn of the pixels, and every distance between images that of the pixels.
    """
    height, width = (_cosines(extent, images.dtype, images.device) for extent in images.shape[2:])
    return height @ images @ width.T


def local_deviation(images: Tensor) -> Tensor:
    """The standard deviation in the 3 x 3 pixels around each, fewer at the border: [N, C, H, W] -> the same shape."""
    return in_chunks(_local_deviation, images, 4 * 8 * images[0].numel())


def _local_deviation(images: Tensor) -> Tensor:
    pixels = images.double()  # in a flat region E[x²] - E[x]² is lost in float32
    mean, of_squares = (
        F.avg_pool2d(values, 3, stride=1, padding=1, count_include_pad=False) for values in (pixels, pixels.square())
    )
    return (of_squares - mean.square()).clamp_min_(0).add_(_STD_FLOOR).sqrt_().to(images.dtype)


def patch_scattering(images: Tensor) -> Tensor:
    """`scattering` of each of 4 x 4 patches by itself: [N, C, H, W] -> [N, 16, C, 81, h, w].

    What 4 does not divide is cut off at the right and at the bottom. Patches have to be of 4 pixels at least.
    """
    height, width = (extent // _PATCHES for extent in images.shape[2:])
    whole = images[..., : height * _PATCHES, : width * _PATCHES]
    patches = whole.unflatten(3, (_PATCHES, width)).unflatten(2, (_PATCHES, height))  # [N, C, 4, h, 4, w]
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    return scattering(patches).unflatten(0, (len(images), _PATCHES**2))


@lru_cache(maxsize=8)
def _cosines(extent: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[extent, extent]: row k is 2 cos(πk(2n + 1) / 2N)."""
    frequency, position = torch.arange(extent, dtype=torch.float64)[:, None], torch.arange(extent, dtype=torch.float64)
    return (2 * torch.cos(math.pi * frequency * (2 * position + 1) / (2 * extent))).to(device, dtype)


def _working_dtype(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32


_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "pixels": lambda images: images,
        "scattering": scattering,
        "hog": oriented_gradients,
        "local_std": local_deviation,
        "dct": discrete_cosines,
        "patch_scattering": patch_scattering,
    }
)
_AUGMENTABLE = ("pixels", "scattering", "hog", "local_std")
NAMES = (*_FUNCTIONS, *(_AUGMENTED + name for name in _AUGMENTABLE))
