"""TorchScript, traced in eval mode. PyTorch calls it deprecated in favour of torch.export (``--to pt2``)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from tools.exporting.job import Job

SUFFIX = ".pt"
LIBRARIES: tuple[str, ...] = ()
NORMALISATION = True


def refusal(arch: str, small: bool) -> str | None:
    return None


def beside(arch: str) -> tuple[str, ...]:
    return ()


def write(job: Job, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        traced = torch.jit.trace(job.network(), torch.rand(2, 3, job.size, job.size))
        metadata = job.metadata(how_to_load(job, job.output.name))
        torch.jit.save(traced, path, _extra_files={"twinstream": metadata})


def read(job: Job, path: Path) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return cast(Callable[[Tensor], Tensor], torch.jit.load(path, map_location="cpu"))


def checked_by() -> str:
    return f"torch.jit {torch.__version__}"


def how_to_load(job: Job, path: str) -> str:
    return f"import torch; model = torch.jit.load({path!r})"
