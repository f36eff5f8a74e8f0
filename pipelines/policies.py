"""RandAugment and AutoAugment on batches of uint8 crops, equal to torchvision's on one image.

Which operations an image gets is drawn as everything of a view is (`pipelines.draw`). Images with the same operation
and strength are then changed together by torchvision's own function, on the device of the crops: nearest neighbours,
black where nothing is known. A policy comes after the crop and before `kernels.photometric`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as T

from kernels.transfer import to_device
from pipelines.draw import uniforms
from pipelines.views import Slot, View

_RANDAUGMENT_BINS = 31  # strengths are these many steps from the weakest to the strongest
_AUTOAUGMENT_BINS = 10


def apply_policies(plan: tuple[View, ...], crops: Tensor, *, seed: int, epoch: int, indices: Tensor) -> Tensor:
    """The crops after the policies of their views; the very same tensor if no view has one.

    Args:
        crops: [V, n, S, S, 3] uint8, left as they are.
        indices: [n] int64 on the CPU, positions in the source.

    Returns:
        [V, n, S, S, 3] uint8, on the device of `crops`.
    """
    numbers = [number for number, view in enumerate(plan) if view.policy != "none"]
    if not numbers:
        return crops
    drawn = [
        draw_policy(plan[number], seed=seed, epoch=epoch, indices=indices, view_index=number, size=crops.shape[2])
        for number in numbers
    ]
    images = (
        torch.cat([crops[number] for number in numbers]).permute(0, 3, 1, 2).contiguous()
    )  # [R, 3, S, S], R = views with one × n
    most = max(draws.operations.shape[1] for draws in drawn)
    padded = [draws.padded(most) for draws in drawn]
    operations = torch.cat([draws.operations for draws in padded])
    magnitudes = torch.cat([draws.magnitudes for draws in padded])
    for step in range(most):
        _apply_step(images, operations[:, step], magnitudes[:, step])
    result = crops.clone()
    for number, changed in zip(numbers, images.permute(0, 2, 3, 1).chunk(len(numbers)), strict=True):
        result[number] = changed
    return result


@dataclass(slots=True)
class PolicyDraws:
    """What happens to each of N images, one operation after the other."""

    operations: Tensor  # [N, K] int64, positions in OPERATIONS; 0 (Identity) where none is applied
    magnitudes: Tensor  # [N, K] float64, with their sign; 0 for operations without a strength

    def padded(self, steps: int) -> PolicyDraws:
        """The same with `steps` operations, the last of them Identity."""
        more = (0, steps - self.operations.shape[1])
        return PolicyDraws(pad(self.operations, more), pad(self.magnitudes, more))


def draw_policy(view: View, *, seed: int, epoch: int, indices: Tensor, view_index: int, size: int) -> PolicyDraws:
    """The operations that this view's policy chooses for each image, as torchvision's distributions have it.

    Args:
        view: with `policy_ops` operations of `policy_magnitude` if its policy is randaugment, 2 operations otherwise.
        indices: [N] int64, positions in the source; on the CPU.
        view_index: the place of the view in the plan.
        size: side of the crops, pixels, of which translations are a share.
    """
    steps = view.policy_ops if view.policy == "randaugment" else 2
    u = uniforms(seed, epoch, indices, view_index, range(Slot.POLICY, Slot.POLICY_OPERATION + 3 * steps))
    chosen, applied, sign = (u[:, slot - Slot.POLICY :: 3] for slot in Slot if slot > Slot.POLICY)  # each [N, K]
    if view.policy == "randaugment":
        operations = (chosen * len(_RANDAUGMENT)).long()
        magnitudes = _strengths(_RANDAUGMENT_BINS, size)[:, view.policy_magnitude][operations]
    else:
        table = _tables()[view.policy]
        pair = table[(u[:, 0] * len(table)).long()]  # [N, 2, 3]
        operations = torch.where(applied < pair[..., 1], pair[..., 0], 0).long()
        magnitudes = _strengths(_AUTOAUGMENT_BINS, size)[operations, pair[..., 2].long()]
    signed = torch.tensor([operation.signed for operation in OPERATIONS.values()])[operations]
    return PolicyDraws(operations, torch.where(signed & (sign < 0.5), -magnitudes, magnitudes))


def _apply_step(images: Tensor, operations: Tensor, magnitudes: Tensor) -> None:
    """Change images [R, 3, S, S] in place, those with the same operation and strength together."""
    kinds, group_of = torch.stack([operations.double(), magnitudes], dim=1).unique(dim=0, return_inverse=True)
    functions = [operation.function for operation in OPERATIONS.values()]
    for group, (operation, magnitude) in enumerate(kinds.tolist()):
        if operation > 0:
            rows = (group_of == group).nonzero().squeeze(1)
            rows = to_device(rows, images.device)
            images[rows] = functions[int(operation)](images[rows], magnitude)


def _affine(images: Tensor, *, translate: tuple[float, float] = (0, 0), shear: tuple[float, float] = (0, 0)) -> Tensor:
    """Shears turn about the upper left corner, by angles whose tangents are given; translations are whole pixels."""
    return T.affine(
        images,
        angle=0.0,
        translate=[int(pixels) for pixels in translate],
        scale=1.0,
        shear=[math.degrees(math.atan(tangent)) for tangent in shear],
        center=[0, 0] if any(shear) else None,
    )


@dataclass(frozen=True, slots=True)
class _Operation:
    function: Callable[[Tensor, float], Tensor]  # uint8 [R, 3, S, S], magnitude
    weakest: float | None = None  # None: it has no strength
    strongest: float = 0.0  # of translations, a share of the side
    signed: bool = False  # whether either direction is as likely


_SIDE = 150 / 331  # of an ImageNet crop in the policies' search

# torchvision's RandAugment draws from the first 14.
OPERATIONS: dict[str, _Operation] = {
    "Identity": _Operation(lambda images, _: images),
    "ShearX": _Operation(lambda images, m: _affine(images, shear=(m, 0)), 0.0, 0.3, signed=True),
    "ShearY": _Operation(lambda images, m: _affine(images, shear=(0, m)), 0.0, 0.3, signed=True),
    "TranslateX": _Operation(lambda images, m: _affine(images, translate=(m, 0)), 0.0, _SIDE, signed=True),
    "TranslateY": _Operation(lambda images, m: _affine(images, translate=(0, m)), 0.0, _SIDE, signed=True),
    "Rotate": _Operation(lambda images, m: T.rotate(images, m), 0.0, 30.0, signed=True),
    "Brightness": _Operation(lambda images, m: T.adjust_brightness(images, 1 + m), 0.0, 0.9, signed=True),
    "Color": _Operation(lambda images, m: T.adjust_saturation(images, 1 + m), 0.0, 0.9, signed=True),
    "Contrast": _Operation(lambda images, m: T.adjust_contrast(images, 1 + m), 0.0, 0.9, signed=True),
    "Sharpness": _Operation(lambda images, m: T.adjust_sharpness(images, 1 + m), 0.0, 0.9, signed=True),
    "Posterize": _Operation(lambda images, m: T.posterize(images, int(m)), 8.0, 4.0),
    "Solarize": _Operation(lambda images, m: T.solarize(images, 255 * m), 1.0, 0.0),
    "AutoContrast": _Operation(lambda images, _: T.autocontrast(images)),
    "Equalize": _Operation(lambda images, _: T.equalize(images)),
    "Invert": _Operation(lambda images, _: T.invert(images)),
}
_RANDAUGMENT = list(OPERATIONS)[:14]


@cache
def _strengths(bins: int, size: int) -> Tensor:
    """[operations, bins] float64: magnitudes, rounded to float32 as torchvision's are."""
    rows = []
    for name, operation in OPERATIONS.items():
        if operation.weakest is None:
            rows.append(torch.zeros(bins))
            continue
        strongest = operation.strongest * (size if name.startswith("Translate") else 1)
        row = torch.linspace(operation.weakest, strongest, bins)
        rows.append(row.round() if name == "Posterize" else row)
    return torch.stack(rows).double()


@cache
def _tables() -> dict[str, Tensor]:
    """Policy -> [25, 2, 3] float64: of each pair of operations (position in OPERATIONS, probability, strength)."""
    names = list(OPERATIONS)
    tables = {}
    for policy, text in _AUTOAUGMENT.items():
        words = (entry.split() for line in text.split("\n") if line.strip() for entry in line.split(","))
        rows = [[names.index(name), float(share), float(level)] for name, share, level in words]
        tables[policy] = torch.tensor(rows, dtype=torch.float64).view(-1, 2, 3)
    return tables


# The tables of arXiv:1805.09501 (appendix), as torchvision has them: 25 pairs each, of which an image gets one. An
# entry is operation, probability, strength of 0 to 9 (0 where there is none).
_AUTOAUGMENT = {
    "autoaugment_imagenet": """
        Posterize 0.4 8, Rotate 0.6 9
        Solarize 0.6 5, AutoContrast 0.6 0
        Equalize 0.8 0, Equalize 0.6 0
        Posterize 0.6 7, Posterize 0.6 6
        Equalize 0.4 0, Solarize 0.2 4
        Equalize 0.4 0, Rotate 0.8 8
        Solarize 0.6 3, Equalize 0.6 0
        Posterize 0.8 5, Equalize 1.0 0
        Rotate 0.2 3, Solarize 0.6 8
        Equalize 0.6 0, Posterize 0.4 6
        Rotate 0.8 8, Color 0.4 0
        Rotate 0.4 9, Equalize 0.6 0
        Equalize 0.0 0, Equalize 0.8 0
        Invert 0.6 0, Equalize 1.0 0
        Color 0.6 4, Contrast 1.0 8
        Rotate 0.8 8, Color 1.0 2
        Color 0.8 8, Solarize 0.8 7
        Sharpness 0.4 7, Invert 0.6 0
        ShearX 0.6 5, Equalize 1.0 0
        Color 0.4 0, Equalize 0.6 0
        Equalize 0.4 0, Solarize 0.2 4
        Solarize 0.6 5, AutoContrast 0.6 0
        Invert 0.6 0, Equalize 1.0 0
        Color 0.6 4, Contrast 1.0 8
        Equalize 0.8 0, Equalize 0.6 0
    """,
    "autoaugment_cifar10": """
        Invert 0.1 0, Contrast 0.2 6
        Rotate 0.7 2, TranslateX 0.3 9
        Sharpness 0.8 1, Sharpness 0.9 3
        ShearY 0.5 8, TranslateY 0.7 9
        AutoContrast 0.5 0, Equalize 0.9 0
        ShearY 0.2 7, Posterize 0.3 7
        Color 0.4 3, Brightness 0.6 7
        Sharpness 0.3 9, Brightness 0.7 9
        Equalize 0.6 0, Equalize 0.5 0
        Contrast 0.6 7, Sharpness 0.6 5
        Color 0.7 7, TranslateX 0.5 8
        Equalize 0.3 0, AutoContrast 0.4 0
        TranslateY 0.4 3, Sharpness 0.2 6
        Brightness 0.9 6, Color 0.2 8
        Solarize 0.5 2, Invert 0.0 0
        Equalize 0.2 0, AutoContrast 0.6 0
        Equalize 0.2 0, Equalize 0.6 0
        Color 0.9 9, Equalize 0.6 0
        AutoContrast 0.8 0, Solarize 0.2 8
        Brightness 0.1 3, Color 0.7 0
        Solarize 0.4 5, AutoContrast 0.9 0
        TranslateY 0.9 9, TranslateY 0.7 9
        AutoContrast 0.9 0, Solarize 0.8 3
        Equalize 0.8 0, Invert 0.1 0
        TranslateY 0.7 9, AutoContrast 0.9 0
    """,
    "autoaugment_svhn": """
        ShearX 0.9 4, Invert 0.2 0
        ShearY 0.9 8, Invert 0.7 0
        Equalize 0.6 0, Solarize 0.6 6
        Invert 0.9 0, Equalize 0.6 0
        Equalize 0.6 0, Rotate 0.9 3
        ShearX 0.9 4, AutoContrast 0.8 0
        ShearY 0.9 8, Invert 0.4 0
        ShearY 0.9 5, Solarize 0.2 6
        Invert 0.9 0, AutoContrast 0.8 0
        Equalize 0.6 0, Rotate 0.9 3
        ShearX 0.9 4, Solarize 0.3 3
        ShearY 0.8 8, Invert 0.7 0
        Equalize 0.9 0, TranslateY 0.6 6
        Invert 0.9 0, Equalize 0.6 0
        Contrast 0.3 3, Rotate 0.8 4
        Invert 0.8 0, TranslateY 0.0 2
        ShearY 0.7 6, Solarize 0.4 8
        Invert 0.6 0, Rotate 0.8 4
        ShearY 0.3 7, TranslateX 0.9 3
        ShearX 0.1 6, Invert 0.6 0
        Solarize 0.7 2, TranslateY 0.6 7
        ShearY 0.8 4, Invert 0.8 0
        ShearX 0.7 9, TranslateY 0.8 3
        ShearY 0.8 5, AutoContrast 0.7 0
        ShearX 0.7 2, Invert 0.1 0
    """,
}
