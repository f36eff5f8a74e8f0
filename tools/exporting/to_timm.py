"""timm's names, which for these ResNets are torchvision's; timm reads the file as pretrained weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from torch import Tensor

from tools.exporting import to_torchvision
from tools.exporting.job import ExportError, Job

SUFFIX = ".safetensors"
LIBRARIES: tuple[str, ...] = ("timm",)
NORMALISATION = False


def refusal(arch: str, small: bool) -> str | None:
    return f"timm has no {arch}; --to torchscript, pt2 or onnx takes it" if arch == "resnet8x4" else None


def beside(arch: str) -> tuple[str, ...]:
    return ()


def write(job: Job, path: Path) -> None:
    to_torchvision.save_weights(job, path, how_to_load(job, job.output.name))


def read(job: Job, path: Path) -> Callable[[Tensor], Tensor]:
    import timm

    if job.small:
        model = to_torchvision.with_stem(timm.create_model(job.arch, num_classes=0), small=True)
        model.load_state_dict(load_file(path))
    else:
        overlay = _overlay(job, str(path))
        model = timm.create_model(job.arch, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    names = set(load_file(path)) ^ set(model.state_dict())
    if names:
        raise ExportError(f"timm's {job.arch} and the file differ in {sorted(names)}")
    return cast(Callable[[Tensor], Tensor], model.eval())


def checked_by() -> str:
    import timm

    return f"timm {timm.__version__}"


def how_to_load(job: Job, path: str) -> str:
    if job.small:
        steps = ["import safetensors.torch, timm, torch", f"model = timm.create_model({job.arch!r}, num_classes=0)"]
        steps += [to_torchvision.SMALL_STEM]
        steps += [f"model.load_state_dict(safetensors.torch.load_file({path!r}))"]
    else:
        overlay = ", ".join(f"{name}={value!r}" for name, value in _overlay(job, path).items())
        options = f"pretrained=True, num_classes=0, pretrained_cfg_overlay=dict({overlay})"
        steps = ["import timm", f"model = timm.create_model({job.arch!r}, {options})"]
    return "; ".join([*steps, "model.eval()"])


def _overlay(job: Job, path: str) -> dict[str, Any]:
    """What timm is to believe of the weights; without ``num_classes`` it would look for a classifier."""
    mean, std = tuple(job.about["mean"]), tuple(job.about["std"])
    return {"file": path, "num_classes": 0, "input_size": (3, job.size, job.size), "mean": mean, "std": std}
