"""What a view is, as data (which crop, how coloured and blurred), and the draws that make one of a sample.

A plan is a tuple of views. A recipe names one (`plan: byol`), bends it (`strength`, `override`) or spells out
its own (`custom`). Geometry (`draw_boxes`) happens beside the decoder, policies (`pipelines.policies`) and photometry
(`draw_photometric`) on the training device; all are pure functions of (seed, epoch, sample index, view).
"""

import difflib
from enum import IntEnum
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError, field_validator, model_validator
from torch import Tensor

from kernels.photometric import ORDERS, PhotometricParams
from pipelines.config import Section
from pipelines.draw import uniforms

_ATTEMPTS = 10  # of a random resized crop to fit in the image, as torchvision
_PROBABILITIES = ("flip", "jitter", "grayscale", "blur", "solarize")
_STRENGTHS = ("brightness", "contrast", "saturation", "hue")
_SHARED = ("blur_kernel", "solarize_threshold")  # the same in all views of a plan: one a `photometric` call


class View(Section):
    """One view of an image. A bare View() is the whole image, normalised and nothing else."""

    # "whole" squeezes an image that is not square, "center" takes the largest central square, "pad_and_crop"
    # shifts the image by up to `pad` output pixels and fills with black.
    crop: Literal["random_resized", "pad_and_crop", "whole", "center"] = "whole"
    crop_scale: tuple[float, float] = (0.08, 1.0)  # random_resized: share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # random_resized: width / height
    pad: int = Field(default=4, ge=0)
    flip: float = 0.0  # probabilities here and below
    jitter: float = 0.0
    brightness: float = 0.0  # strengths: a factor between 1 - b (at least 0) and 1 + b
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # in turns: a shift between -hue and hue
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    blur_kernel: int | None = None  # odd, pixels; None: a tenth of the image's side (`View.kernel`)
    solarize: float = 0.0
    solarize_threshold: float = 0.5
    # torchvision's RandAugment, or its AutoAugment with one of its three tables: after the crop, before all else.
    policy: Literal["none", "randaugment", "autoaugment_imagenet", "autoaugment_cifar10", "autoaugment_svhn"] = "none"
    policy_ops: int = Field(default=2, ge=1, le=16)  # randaugment: operations one after the other
    policy_magnitude: int = Field(default=9, ge=0, le=30)  # randaugment: of all operations, 30 is the strongest

    @property
    def augmented(self) -> bool:
        """Whether two draws of this view can differ."""
        moved = self.crop in ("random_resized", "pad_and_crop")
        return moved or self.policy != "none" or any(getattr(self, name) > 0 for name in _PROBABILITIES)

    def kernel(self, size: int) -> int:
        """The blur kernel for views of `size` pixels: as given, else 23 at 224, 9 at 96, 3 at 32 and less."""
        return self.blur_kernel or max(2 * (size // 20) + 1, 3)

    @field_validator(*_PROBABILITIES, "solarize_threshold")
    @classmethod
    def _in_unit_interval(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError(f"expected a number in [0, 1], got {value}")
        return value

    @field_validator(*_STRENGTHS)
    @classmethod
    def _strength(cls, value: float, info: Any) -> float:
        if value < 0 or (info.field_name == "hue" and value > 0.5):
            limit = "a number in [0, 0.5] (half a turn)" if info.field_name == "hue" else "0 or more"
            raise ValueError(f"expected {limit}, got {value}")
        return value

    @field_validator("crop_scale", "crop_ratio", "blur_sigma")
    @classmethod
    def _ordered(cls, value: tuple[float, float], info: Any) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError(f"expected [low, high] with 0 < low <= high, got {list(value)}")
        if info.field_name == "crop_scale" and value[1] > 1:
            raise ValueError(f"expected a share of the image's area, at most 1, got {list(value)}")
        return value

    @field_validator("blur_kernel")
    @classmethod
    def _odd(cls, value: int | None) -> int | None:
        if value is not None and (value < 1 or value % 2 == 0):
            raise ValueError(f"expected an odd number of pixels, got {value}")
        return value


def _simclr(strength: float, **changes: Any) -> View:
    fields: dict[str, Any] = {
        "crop": "random_resized",
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.8 * strength,
        "contrast": 0.8 * strength,
        "saturation": 0.8 * strength,
        "hue": 0.2 * strength,
        "grayscale": 0.2,
    }
    return View(**(fields | changes))


_BYOL = _simclr(0.5).model_copy(update={"saturation": 0.2})  # jitter 0.4, 0.4, 0.2, 0.1
_PLAIN = View(crop="center")
_DIGITS = View(crop="random_resized", crop_scale=(0.4, 1.0), jitter=0.8, brightness=0.4, contrast=0.4)

# Sources: SimCLR arXiv:2002.05709 (appendix A and, for CIFAR, B.9), BYOL arXiv:2006.07733 (table 6), MV-MR
# arXiv:2303.12130 and its code's policies. No blur where images are 32 pixels, as the papers' CIFAR experiments.
# Digits are never mirrored, since a mirrored digit is another sign, and have no colours to change.
PLANS: MappingProxyType[str, tuple[View, ...]] = MappingProxyType(
    {
        "simclr": (_simclr(1.0, blur=0.5),) * 2,
        "simclr_cifar": (_simclr(0.5),) * 2,
        "byol": (
            _BYOL.model_copy(update={"blur": 1.0}),
            _BYOL.model_copy(update={"blur": 0.1, "solarize": 0.2}),
        ),
        "byol_cifar": (_BYOL, _BYOL.model_copy(update={"solarize": 0.2})),
        "mvmr": (_PLAIN, _simclr(1.0, blur=1.0)),
        "mvmr_randaugment": (
            _PLAIN,
            View(crop="random_resized", policy="randaugment", policy_ops=4, policy_magnitude=10),
        ),
        "mvmr_autoaugment": (_PLAIN, View(crop="random_resized", policy="autoaugment_imagenet")),
        "mvmr_cifar": (_PLAIN, View(crop="pad_and_crop", pad=4, flip=0.5)),
        "mvmr_cifar20": (_PLAIN, _simclr(0.5, crop_scale=(0.2, 1.0), grayscale=0.1)),
        "digits": (_DIGITS,) * 2,
    }
)
_PLAN_STRENGTH = {
    "simclr_cifar": 0.5,
    "mvmr_cifar20": 0.5,
}  # what `strength` is measured from; the other plans stand at 1


class ViewsConfig(Section):
    """The `views` section of a recipe."""

    plan: str = "simclr"
    # Of the colour jitter; None: the plan's own, which is 1 (simclr_cifar, mvmr_cifar20: 0.5).
    strength: float | None = Field(default=None, ge=0)
    override: dict[str, Any] = Field(default={})  # fields of View, set in every augmented view of the plan
    custom: tuple[View, ...] | None = None  # a whole plan of one's own, in place of `plan`
    repeat: int = Field(default=1, ge=1, le=64)  # the whole plan so many times, drawn anew: 2 views become 4, 6, …
    size: int | None = Field(default=None, ge=1, le=4096)  # pixels of the crops' side; None: the data set's image size

    def resolve(self) -> tuple[View, ...]:
        """The views of one sample."""
        return (self.custom or tuple(self._bend(view) for view in PLANS[self.plan])) * self.repeat

    def _bend(self, view: View) -> View:
        fields = view.model_dump()
        if self.strength is not None:
            ratio = self.strength / _PLAN_STRENGTH.get(self.plan, 1.0)
            fields |= {name: fields[name] * ratio for name in _STRENGTHS}
        for name, value in self.override.items():
            if view.augmented or name in _SHARED:
                fields[name] = value
        return View(**fields)

    @field_validator("plan")
    @classmethod
    def _known_plan(cls, value: str) -> str:
        if value not in PLANS:
            raise ValueError(f"no plan {value!r}{_nearest(value, PLANS)}; there are {', '.join(PLANS)}")
        return value

    @model_validator(mode="after")
    def _valid_plan(self) -> "ViewsConfig":
        if self.custom is not None:
            for name in ("strength", "override"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"custom is a whole plan: remove {name}, or remove custom")
            if not self.custom:
                raise ValueError("custom: expected at least one view, got an empty list")
        for key in self.override:
            if key not in View.model_fields:
                raise ValueError(f"override: a view has no {key!r}{_nearest(key, View.model_fields)}")
        try:
            views = self.resolve()
        except ValidationError as error:
            found = [f"{e['loc'][0]}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
            raise ValueError("override, strength: " + "; ".join(found)) from None
        for name in _SHARED:
            if len({getattr(view, name) for view in views}) > 1:
                raise ValueError(f"{name} must be the same in all views of a plan")
        return self


def _nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (nearest: {found[0]!r})" if found else ""


class Slot(IntEnum):
    """Which number of a view is used for what. Part of a seed's meaning: renumbering changes every run."""

    CROP_AREA = 0  # attempt k draws CROP_AREA + 2k and CROP_RATIO + 2k
    CROP_RATIO = 1
    CROP_TOP = 20
    CROP_LEFT = 21
    FLIP = 32
    JITTER = 33
    ORDER = 34
    BRIGHTNESS = 35
    CONTRAST = 36
    SATURATION = 37
    HUE = 38
    GRAYSCALE = 39
    BLUR = 40
    BLUR_SIGMA = 41
    SOLARIZE = 42
    POLICY = 64  # which pair of an AutoAugment table
    POLICY_OPERATION = 65  # operation k of a policy draws these three + 3k
    POLICY_APPLIED = 66
    POLICY_SIGN = 67


def draw_boxes(
    view: View,
    *,
    seed: int,
    epoch: int,
    indices: Tensor,
    view_index: int,
    heights: Tensor,
    widths: Tensor,
    size: int,
) -> Tensor:
    """The box that this view cuts out of each image.

    Args:
        indices: [N] int64, positions in the source.
        view_index: the place of the view in the plan: equal views at different places draw differently.
        heights, widths: [N], pixels of each image, on the device of `indices`.
        size: side of the crop after resizing, pixels; `pad` counts these.

    Returns:
        [N, 4] int64 (top, left, height, width). With pad_and_crop it may reach outside the image.
    """
    heights, widths = heights.to(torch.int64), widths.to(torch.int64)
    if view.crop == "whole":
        zeros = torch.zeros_like(heights)
        return torch.stack([zeros, zeros, heights, widths], dim=1)
    if view.crop == "center":
        return center_boxes(heights, widths)
    draws = uniforms(seed, epoch, indices, view_index, Slot.CROP_LEFT + 1)
    u_top, u_left = draws[:, Slot.CROP_TOP], draws[:, Slot.CROP_LEFT]
    if view.crop == "pad_and_crop":
        pad_y, pad_x = ((view.pad * extent / size).round() for extent in (heights, widths))
        top, left = _integer(u_top, 2 * pad_y + 1) - pad_y, _integer(u_left, 2 * pad_x + 1) - pad_x
        return torch.stack([top.to(torch.int64), left.to(torch.int64), heights, widths], dim=1)
    box_heights, box_widths, fitted = _resized_crop_sides(view, draws, heights, widths)
    tops = torch.where(fitted, _integer(u_top, heights - box_heights + 1), (heights - box_heights) // 2)
    lefts = torch.where(fitted, _integer(u_left, widths - box_widths + 1), (widths - box_widths) // 2)
    return torch.stack([tops, lefts, box_heights, box_widths], dim=1).to(torch.int64)


def draw_photometric(
    view: View, *, seed: int, epoch: int, indices: Tensor, view_index: int, size: int
) -> PhotometricParams:
    """What `kernels.photometric` is to do to this view of each sample.

    Args:
        indices: [N] int64, positions in the source; best on the CPU, where the parameters belong.
        view_index: the place of the view in the plan.
        size: side of the crops, pixels.
    """
    slots = range(Slot.FLIP, Slot.SOLARIZE + 1)
    u = dict(zip(slots, uniforms(seed, epoch, indices, view_index, slots).unbind(1), strict=True))

    def factor(slot: Slot, strength: float) -> Tensor:
        low = max(0.0, 1 - strength)
        return (low + u[slot] * (1 + strength - low)).float()

    low, high = view.blur_sigma
    sigma = low + u[Slot.BLUR_SIGMA] * (high - low)
    orders = torch.tensor(ORDERS, device=indices.device)
    return PhotometricParams(
        flip=u[Slot.FLIP] < view.flip,
        jitter=u[Slot.JITTER] < view.jitter,
        order=orders[_integer(u[Slot.ORDER], len(ORDERS)).to(torch.int64)],
        brightness=factor(Slot.BRIGHTNESS, view.brightness),
        contrast=factor(Slot.CONTRAST, view.contrast),
        saturation=factor(Slot.SATURATION, view.saturation),
        hue=((2 * u[Slot.HUE] - 1) * view.hue).float(),
        grayscale=u[Slot.GRAYSCALE] < view.grayscale,
        blur_sigma=(sigma * (u[Slot.BLUR] < view.blur)).float(),
        solarize=u[Slot.SOLARIZE] < view.solarize,
        blur_kernel=view.kernel(size),
        solarize_threshold=view.solarize_threshold,
    )


def draw_plan_boxes(
    plan: tuple[View, ...], *, seed: int, epoch: int, indices: Tensor, heights: Tensor, widths: Tensor, size: int
) -> Tensor:
    """The boxes of all views, [V, N, 4] int64: `draw_boxes` of each."""
    shared: dict[str, Any] = {"seed": seed, "epoch": epoch, "indices": indices, "size": size}
    shared |= {"heights": heights, "widths": widths}
    return torch.stack([draw_boxes(view, view_index=number, **shared) for number, view in enumerate(plan)])


def draw_plan_photometric(
    plan: tuple[View, ...], *, seed: int, epoch: int, indices: Tensor, size: int
) -> PhotometricParams:
    """The parameters of all views, one view after the other (V * N samples): `draw_photometric` of each."""
    shared: dict[str, Any] = {"seed": seed, "epoch": epoch, "indices": indices, "size": size}
    return PhotometricParams.cat([draw_photometric(view, view_index=i, **shared) for i, view in enumerate(plan)])


def center_boxes(heights: Tensor, widths: Tensor) -> Tensor:
    """[N, 4] int64: the central square that takes the whole short side."""
    heights, widths = heights.to(torch.int64), widths.to(torch.int64)
    sides = torch.minimum(heights, widths)
    return torch.stack([(heights - sides) // 2, (widths - sides) // 2, sides, sides], dim=1)


def _resized_crop_sides(view: View, draws: Tensor, heights: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(heights[N], widths[N], whether any attempt fitted[N]) of random resized crops, tried all at once."""
    (scale_low, scale_high), (ratio_low, ratio_high) = view.crop_scale, view.crop_ratio
    u_area = draws[:, Slot.CROP_AREA : Slot.CROP_AREA + 2 * _ATTEMPTS : 2]  # [N, attempts]
    u_ratio = draws[:, Slot.CROP_RATIO : Slot.CROP_RATIO + 2 * _ATTEMPTS : 2]
    heights, widths = heights.to(torch.float64), widths.to(torch.float64)
    area = (heights * widths)[:, None] * (scale_low + u_area * (scale_high - scale_low))
    ratio = ratio_low * (ratio_high / ratio_low) ** u_ratio  # uniform in the logarithm
    box_widths, box_heights = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (box_widths > 0) & (box_widths <= widths[:, None])
    fits &= (box_heights > 0) & (box_heights <= heights[:, None])
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
    fitted = fits.any(dim=1)

    # None fitted: the largest central box whose ratio is allowed.
    in_ratio = widths / heights
    tallest = torch.where(in_ratio < ratio_low, (widths / ratio_low).round(), heights)
    widest = torch.where(in_ratio > ratio_high, (heights * ratio_high).round(), widths)
    box_heights = torch.where(fitted, box_heights.gather(1, first).squeeze(1), tallest)
    box_widths = torch.where(fitted, box_widths.gather(1, first).squeeze(1), widest)
    return box_heights.to(torch.int64), box_widths.to(torch.int64), fitted


def _integer(u: Tensor, count: Tensor | int) -> Tensor:
    """Uniform on 0 .. count - 1, from u in [0, 1)."""
    return (u * count).floor()
