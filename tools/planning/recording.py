"""Writes down what is asked of torch.distributed: the collectives, their bytes, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

# By function: which of its arguments, by position and name, is the tensor that is counted. It is the larger one: what
# all ranks together put in or get out.
_COUNTED = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "all_gather_single": (0, "output"),
    "all_gather": (0, "tensor_list"),
    "reduce_scatter_tensor": (1, "input"),
    "reduce_scatter": (1, "input_list"),
    "all_to_all_single": (1, "input"),
}


@dataclass(frozen=True, slots=True)
class Call:
    """One collective, as this rank called it."""

    name: str
    size: int  # bytes of the tensor that all ranks share: gathered, to be scattered, or reduced
    seconds: float  # until it came back; on a GPU only until it was launched


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Inside, every collective of this process is appended to the list. To be entered before DeepSpeed starts."""
    calls: list[Call] = []
    with ExitStack() as patches:
        for name, (position, keyword) in _COUNTED.items():
            if hasattr(dist, name):  # older versions of PyTorch lack one
                function = _recording(getattr(dist, name), calls, position, keyword)
                patches.enter_context(patch.object(dist, name, function))
        yield calls


def _recording(function: Callable[..., Any], calls: list[Call], position: int, keyword: str) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        counted = kwargs[keyword] if keyword in kwargs else args[position]
        start = time.perf_counter()
        result = function(*args, **kwargs)
        calls.append(Call(function.__name__, _bytes(counted), time.perf_counter() - start))
        return result

    return call


def _bytes(tensors: Tensor | Sequence[Tensor]) -> int:
    several = [tensors] if isinstance(tensors, Tensor) else tensors
    return sum(tensor.numel() * tensor.element_size() for tensor in several)
