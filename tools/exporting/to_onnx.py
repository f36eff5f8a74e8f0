"""ONNX: input "images", output "features"; the number of images is free, their size is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim

from tools.exporting.job import ExportError, Job

SUFFIX = ".onnx"
LIBRARIES: tuple[str, ...] = ("onnx", "onnxscript", "onnxruntime")
NORMALISATION = True
OPSET = 18  # onnxruntime reads it since 1.14


def refusal(arch: str, small: bool) -> str | None:
    return None


def beside(arch: str) -> tuple[str, ...]:
    return ()


def write(job: Job, path: Path) -> None:
    program = torch.onnx.export(
        job.network(),
        (torch.rand(2, 3, job.size, job.size),),
        dynamo=True,
        dynamic_shapes=({0: Dim("batch")},),
        input_names=["images"],
        output_names=["features"],
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["twinstream"] = job.metadata(how_to_load(job, job.output.name))
    program.save(path, external_data=False)


def read(job: Job, path: Path) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the file: {error}") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def checked_by() -> str:
    import onnx
    import onnxruntime

    return f"onnx.checker {onnx.__version__} and onnxruntime {onnxruntime.__version__}, opset {OPSET}"


def how_to_load(job: Job, path: str) -> str:
    session = f"onnxruntime.InferenceSession({path!r}, providers=['CPUExecutionProvider'])"
    return f"import onnxruntime; session = {session}; features = session.run(None, {{'images': images}})[0]"
