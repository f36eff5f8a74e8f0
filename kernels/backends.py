"""Which of an operation's implementations runs: fused in Triton, in tiles of PyTorch, or plain."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "tiled", "reference")


def choose_backend(backend: str, *inputs: Tensor) -> str:
    """ "triton", "tiled" or "reference": what `backend` means for these inputs.

    "auto" is "triton" for tensors of up to 32 bits on a CUDA device of compute capability 8.0 or higher, and "tiled"
    for all others. "triton" on CPU tensors runs
    under Triton's interpreter, which is slow and there for tests: TRITON_INTERPRET=1 has to be in the environment
    before Python starts.

    Raises:
        ValueError: an unknown backend, or Triton asked to do what it cannot: float64, or a CPU without interpreter.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    wide = any(tensor.dtype == torch.float64 for tensor in inputs)
    on_cuda = all(tensor.device.type == "cuda" for tensor in inputs)
    if backend == "auto":
        return "triton" if on_cuda and not wide and triton_is_installed() and _recent(inputs[0].device) else "tiled"
    if backend == "triton":
        if wide:
            raise ValueError("backend 'triton' computes in float32, expected no float64 inputs; use 'tiled'")
        if not triton_is_installed():
            raise ValueError("backend 'triton' needs the package triton, which is not installed; use 'tiled'")
        if not on_cuda and not interpreted():
            raise ValueError(
                "backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1 in the environment, to run them slowly on "
                f"the CPU), got {', '.join(sorted({str(tensor.device) for tensor in inputs}))}; use 'tiled'"
            )
    return backend


def tf32_allowed() -> bool:
    """Whether the user lets float32 matrix products on CUDA be made of TF32, by either of PyTorch's settings."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the newer setting has been used, and the older one refuses to be read
        return "tf32" in (torch.backends.cuda.matmul.fp32_precision, getattr(torch.backends, "fp32_precision", ""))


@functools.cache
def _recent(device: torch.device) -> bool:
    """Ampere or later: what the kernels are compiled for in the tests. Before, they would not fit."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
