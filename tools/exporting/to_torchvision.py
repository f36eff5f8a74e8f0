"""torchvision's names: the encoder's own, without a classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.exporting.job import ExportError, Job

SUFFIX = ".safetensors"
LIBRARIES: tuple[str, ...] = ()
NORMALISATION = False
CLASSIFIER = {"fc.weight", "fc.bias"}
SMALL_STEM = "model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False); model.maxpool = torch.nn.Identity()"


def refusal(arch: str, small: bool) -> str | None:
    return (
        None
        if hasattr(torchvision.models, arch)
        else f"torchvision has no {arch}; --to torchscript, pt2 or onnx takes it"
    )


def beside(arch: str) -> tuple[str, ...]:
    return ()


def write(job: Job, path: Path) -> None:
    save_weights(job, path, how_to_load(job, job.output.name))


def read(job: Job, path: Path) -> Callable[[Tensor], Tensor]:
    model = with_stem(getattr(torchvision.models, job.arch)(weights=None), job.small)
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    if set(missing) != CLASSIFIER or unexpected:
        raise ExportError(f"torchvision's {job.arch} misses {missing} and does not know {unexpected}")
    model.fc = nn.Identity()
    return cast(Callable[[Tensor], Tensor], model.eval())


def checked_by() -> str:
    return f"torchvision {torchvision.__version__}"


def how_to_load(job: Job, path: str) -> str:
    steps = ["import safetensors.torch, torch, torchvision", f"model = torchvision.models.{job.arch}()"]
    steps += [SMALL_STEM] if job.small else []
    steps += ["model.fc = torch.nn.Identity()", f"model.load_state_dict(safetensors.torch.load_file({path!r}))"]
    return "; ".join([*steps, "model.eval()"])


def save_weights(job: Job, path: Path, load: str) -> None:
    """The encoder's tensors under its own names."""
    tensors = {name: value.contiguous() for name, value in job.module.state_dict().items()}
    save_file(tensors, path, metadata={"twinstream": job.metadata(load)})


def with_stem(model: Any, small: bool) -> Any:
    """The model as ``SMALL_STEM`` makes it, where the stem is small."""
    if small:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model
