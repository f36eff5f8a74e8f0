"""torch.export's archive, TorchScript's successor; the number of images is free, their size is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.export import Dim

from tools.exporting.job import Job

SUFFIX = ".pt2"
LIBRARIES: tuple[str, ...] = ()
NORMALISATION = True


def refusal(arch: str, small: bool) -> str | None:
    return None


def beside(arch: str) -> tuple[str, ...]:
    return ()


def write(job: Job, path: Path) -> None:
    images = torch.rand(2, 3, job.size, job.size)
    program = torch.export.export(job.network(), (images,), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, path, extra_files={"twinstream": job.metadata(how_to_load(job, job.output.name))})


def read(job: Job, path: Path) -> Callable[[Tensor], Tensor]:
    return cast(Callable[[Tensor], Tensor], torch.export.load(path).module())


def checked_by() -> str:
    return f"torch.export {torch.__version__}"


def how_to_load(job: Job, path: str) -> str:
    return f"import torch; model = torch.export.load({path!r}).module()"
