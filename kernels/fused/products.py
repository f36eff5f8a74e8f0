"""Matrix products of tiles, and the rounding before them, the same under Triton's interpreter as on a GPU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backends import interpreted, tf32_allowed

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr = None):
    """a @ b + accumulator, in float32. PRECISION: of `precision`, matters to float32 tiles only."""
    if _INTERPRETED:
        # Triton's interpreter keeps bfloat16 as 16-bit integers, and would multiply those.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Float32 x in another floating-point dtype, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        # The interpreter truncates. What is rounded here survives that.
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


def precision(rows: Tensor) -> str | None:
    """How float32 rows are multiplied: three TF32 products, nearly exact, or one if PyTorch's own may be."""
    if rows.dtype != torch.float32:
        return None
    return "tf32" if tf32_allowed() else "tf32x3"
