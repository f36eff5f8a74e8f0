"""What the tests of several kernels share."""

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tests.interpreter  # noqa: F401  (pytest imports it for its own process only, not for ranks)

# With a GPU the Triton kernels run on it, else under Triton's interpreter (see tests/interpreter.py).
TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    expected = expected.double()
    return ((found.double() - expected).norm() / expected.norm()).item()


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned, backward pass included."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result
