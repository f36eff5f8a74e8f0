"""The random numbers of a view: a pure function of (seed, epoch, sample index, view, slot).

No generator carries a state, so a run resumes in mid-epoch with the draws it would have had, and neither the
number of workers or ranks nor the composition of a batch changes what a sample sees. The function is a
counter hash built on the SplitMix64 finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014). The same 64 bits come out of torch on any device, of numba, and of plain Python.

A slot is one use of a number within a view (the flip, the hue factor, ...): see `pipelines.views.Slot`.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from kernels.transfer import to_device

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: steps by it spread over all 64 bits
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB
_ORDER_STREAM = -1  # in place of a view (views count from 0): the stream of epoch orders


def uniform(seed: int, epoch: int, indices: Tensor, view: int, slot: int) -> Tensor:
    """One number a sample.

    Args:
        seed: 0 to 2**63 - 1. epoch, view, slot: from 0.
        indices: [N] int64, positions in the source; any device.

    Returns:
        [N] float64 in [0, 1), multiples of 2**-53, on the device of `indices`.

    Raises:
        ValueError: for a number out of its range or indices that are not int64.
    """
    return uniforms(seed, epoch, indices, view, range(slot, slot + 1)).squeeze(-1)


def uniforms(seed: int, epoch: int, indices: Tensor, view: int, slots: int | Sequence[int]) -> Tensor:
    """Several numbers a sample: column j is `uniform` at `slots[j]` (an integer stands for range(slots)).

    Returns:
        [N, S] float64 in [0, 1).
    """
    _check(seed, epoch, view)
    if indices.dtype != torch.int64 or indices.ndim != 1:
        raise ValueError(f"indices: expected [N] int64, got {list(indices.shape)} {indices.dtype}")
    slots = range(slots) if isinstance(slots, int) else slots
    if len(slots) > 0 and min(slots) < 0:
        raise ValueError(f"slots: expected numbers from 0, got {min(slots)}")
    bits = _bits(seed, epoch, indices, view, slots)
    return _shift(bits, 11).to(torch.float64).mul_(2.0**-53)


def permutation(seed: int, epoch: int, n: int, *, device: torch.device | str | None = None) -> Tensor:
    """The order of an epoch: [n] int64, a permutation of range(n).

    Sorts one 64-bit key a sample. Keys never tie, because at a fixed (seed, epoch) the hash is a bijection of
    the index.
    """
    _check(seed, epoch, 0)
    if n < 0:
        raise ValueError(f"n: expected the number of samples, got {n}")
    keys = _bits(seed, epoch, torch.arange(n, device=device), _ORDER_STREAM, range(1)).squeeze(-1)
    return torch.argsort(keys)


def uniform_scalar(seed: int, epoch: int, index: int, view: int, slot: int) -> float:
    """`uniform` for one sample in plain Python integers: the definition that the fast forms must equal."""
    _check(seed, epoch, view)
    state = _mix_int(_key(seed, epoch, view) + (index + 1) * _GOLDEN)
    return (_mix_int(state + (slot + 1) * _GOLDEN) >> 11) * 2.0**-53


@cache
def numba_uniform() -> Callable[[int, int, int, int, int], float]:
    """The compiled twin: f(seed, epoch, index, view, slot) -> float, callable from other numba code (nogil).

    Built at the first call, because importing numba costs seconds. Arguments are not checked.
    """
    import numba
    import numpy as np

    golden, m1, m2 = np.uint64(_GOLDEN), np.uint64(_MULTIPLIER_1), np.uint64(_MULTIPLIER_2)
    s30, s27, s31, s11, one = (np.uint64(n) for n in (30, 27, 31, 11, 1))  # numba: uint64 with int64 is float64

    @numba.njit(inline="always")
    def mix(z):  # type: ignore[no-untyped-def]
        z = (z ^ (z >> s30)) * m1
        z = (z ^ (z >> s27)) * m2
        return z ^ (z >> s31)

    @numba.njit(nogil=True)
    def scalar(seed, epoch, index, view, slot):  # type: ignore[no-untyped-def]
        state = mix(np.uint64(seed) + golden)
        state = mix((state ^ np.uint64(epoch)) + golden)
        state = mix((state ^ np.uint64(view)) + golden)
        state = mix(state + (np.uint64(index) + one) * golden)
        state = mix(state + (np.uint64(slot) + one) * golden)
        return np.float64(state >> s11) * 2.0**-53

    return scalar


def _check(seed: int, epoch: int, view: int) -> None:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1, got {seed}")
    for name, value in (("epoch", epoch), ("view", view)):
        if value < 0:
            raise ValueError(f"{name}: expected a number from 0, got {value}")


def _key(seed: int, epoch: int, view: int) -> int:
    """What all samples of a view share, absorbed one by one (seed 1, epoch 2 is not seed 2, epoch 1)."""
    state = _mix_int(seed + _GOLDEN)
    state = _mix_int((state ^ epoch) + _GOLDEN)
    return _mix_int((state ^ (view & _MASK)) + _GOLDEN)


def _bits(seed: int, epoch: int, indices: Tensor, view: int, slots: Sequence[int]) -> Tensor:
    """[N, S] int64: 64 hashed bits each. The products wrap modulo 2**64, in int64 as in uint64."""
    columns = torch.tensor([_signed((slot + 1) * _GOLDEN) for slot in slots], dtype=torch.int64)
    columns = to_device(columns, indices.device)
    state = _mix((indices + 1) * _signed(_GOLDEN) + _signed(_key(seed, epoch, view)))
    return _mix(state[:, None] + columns)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(_MULTIPLIER_1)
    z = (z ^ _shift(z, 27)) * _signed(_MULTIPLIER_2)
    return z ^ _shift(z, 31)


def _mix_int(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * _MULTIPLIER_1) & _MASK
    z = ((z ^ (z >> 27)) * _MULTIPLIER_2) & _MASK
    return z ^ (z >> 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """The logical right shift: torch's own copies the sign bit."""
    return (z >> by) & (2 ** (64 - by) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK
    return value - 2**64 if value >= 2**63 else value
