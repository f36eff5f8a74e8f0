"""Freed memory stays with the process, by what glibc says of itself."""

import ctypes
import sys
from subprocess import run
from types import SimpleNamespace

import pytest

from trainers.engine import EngineConfig
from trainers.heap import keep_freed_memory

# Prints how many free bytes the process still has after a step that makes and frees two arrays of 40 MB.
STEP = """
import ctypes, sys
import numpy as np
from types import SimpleNamespace
from trainers.heap import keep_freed_memory

kept = keep_freed_memory(SimpleNamespace(keep_memory=sys.argv[1] == "True"), SimpleNamespace(type=sys.argv[2]))
assert kept == (sys.argv[1:] == ["True", "cpu"]), kept
arrays = [np.full(10_000_000, 1, np.float32) for _ in range(2)]
del arrays
told = ctypes.CDLL(None).mallinfo2
told.restype = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(f"field{i}", ctypes.c_size_t) for i in range(10)]})
print(told().field8)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="a C library other than glibc 2.33 or newer")
@pytest.mark.parametrize(
    ("wanted", "device", "stays"), [(True, "cpu", True), (False, "cpu", False), (True, "cuda", False)]
)
def test_a_step_takes_the_memory_of_the_one_before(wanted: bool, device: str, stays: bool) -> None:
    done = run([sys.executable, "-c", STEP, str(wanted), device], capture_output=True, text=True, check=True)
    free = int(done.stdout)
    assert free > 80e6 if stays else free < 40e6, f"{free / 1e6:.1f} MB of 80 MB were kept"


def test_what_other_systems_have_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.heap.sys.platform", "darwin")
    assert not keep_freed_memory(EngineConfig(), SimpleNamespace(type="cpu"))
