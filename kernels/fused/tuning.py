"""How kernels are configured: a short list each, timed once for a size and device, remembered on disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton

from kernels.backends import interpreted

_tuned: list[Any] = []  # every Autotuner


def tuned(
    configs: Sequence[triton.Config], key: Sequence[str], fits: Callable[..., bool] | None = None
) -> Callable[[Any], Any]:
    """Decorator over @triton.jit: the fastest of `configs` for each value of the arguments in `key`.

    The first call with a new key times every configuration; the choice is kept in Triton's cache folder, so that
    a resumed run on one GPU computes with the same tiles, to the last bit (of several ranks each times for itself).
    Under the interpreter the first one is taken.

    Args:
        configs: few; the first must fit every device.
        key: names of arguments. A size enters through `bucket()`, or each new batch size would be tuned anew.
        fits: fits(config, arguments, shared_bytes): whether a configuration suits these arguments on a device with
            so much shared memory a block. None: always.
    """
    if interpreted():
        return triton.autotune(list(configs[:1]), key=[])

    def prune(candidates: list[triton.Config], named_args: Mapping[str, Any], **options: Any) -> list[triton.Config]:
        properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
        shared = properties["max_shared_mem"]
        chosen = suitable(candidates, fits, {**named_args, **options}, shared)
        return chosen[:1] if os.environ.get("TWINSTREAM_AUTOTUNE") == "0" else chosen

    def decorate(function: Any) -> Any:
        tuner = triton.autotune(
            list(configs), key=list(key), prune_configs_by={"early_config_prune": prune}, cache_results=True
        )(function)
        _tuned.append(tuner)
        return tuner

    return decorate


def choices() -> dict[str, dict[str, str]]:
    """Of each kernel that has run in this process: the configuration taken, by the values of its key."""
    return {
        f"{tuner.base_fn.__module__}.{tuner.base_fn.__name__}": {
            str(key): str(config) for key, config in tuner.cache.items()
        }
        for tuner in _tuned
        if tuner.cache
    }


def forget_choices() -> None:
    """What was taken so far, in this process, is chosen anew."""
    for tuner in _tuned:
        tuner.cache.clear()


def suitable(
    configs: Sequence[triton.Config], fits: Callable[..., bool] | None, arguments: Mapping[str, Any], shared: int
) -> list[triton.Config]:
    """The configurations that fit, or the first where none says so."""
    chosen = [config for config in configs if fits is None or fits(config, arguments, shared)]
    return chosen or list(configs[:1])


def bucket(size: int) -> int:
    """A size up to the next power of two: what a key wants to know of it."""
    return max(size - 1, 0).bit_length()


@dataclass(frozen=True)
class CompileCase:
    """One way in which a kernel is used, complete enough to compile it where there is no GPU.

    Args:
        name: for a table: the kernel and what is special, say "ntxent backward, D=128, bf16".
        kernel: what @triton.jit or `tuned` returned.
        types: of the arguments that are not constexpr, by name: "*bf16", "*fp32", "*i64", "i32", "fp32" …
            Pointers and i32 are taken to be divisible by 16 unless named in `odd`.
        constants: the constexpr arguments that no configuration sets.
        configs: the configurations to compile; default: those that `kernel` was tuned with.
        fits: as in `tuned`.
        spills: bytes of stack that are accepted. Zero but where a comment says why.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    configs: Sequence[triton.Config] | None = None
    fits: Callable[..., bool] | None = None
    odd: Sequence[str] = ()
    spills: int = 0

    def function(self) -> Any:
        return getattr(self.kernel, "fn", self.kernel) if hasattr(self.kernel, "configs") else self.kernel

    def suitable(self, shared: int) -> Iterator[triton.Config]:
        configs = self.configs if self.configs is not None else getattr(self.kernel, "configs", None)
        if configs is None:
            yield triton.Config({})
        else:
            yield from suitable(configs, self.fits, self.constants, shared)
