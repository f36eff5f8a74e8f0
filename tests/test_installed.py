"""The loaders' libraries are there: a missing one is a failure, not a row of skips."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("library", ["nvidia.dali", "ffcv"])
def test_loader_library_imports(library: str) -> None:
    if library == "ffcv" and os.environ.get("TWINSTREAM_WITHOUT_FFCV"):
        pytest.skip("FFCV's system libraries could not be had when the environment was made")
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}  # FFCV compiles at import otherwise: seconds
    done = subprocess.run(
        [sys.executable, "-c", f"import {library}"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
