"""The GPU benchmark runs from end to end, in tiny, before someone pays for a GPU to find out that it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.pipelines.stored_sets import write_photos

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
MISSING = "numba", "pydantic", "rich", "sklearn", "yaml", "typer", "deepspeed"
# What benchmarks/gpu.py promises to do without.
WITHOUT_THEM = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({MISSING!r}))
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["gpu.py", *sys.argv[1:]]
import tests.interpreter
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_THEM, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("only", ["kmeans", "bregman", "ntxent"])
def test_the_gpu_benchmark_runs_with_torch_and_triton_alone(only: str, tmp_path: Path) -> None:
    options = ["--only", "checks,kernels", "--match", only, "--one-process"]
    finished = run("--smoke", *options, "--json", str(tmp_path / "found.json"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["limits"]["copy_gb_s"] > 0
    assert found["checks"]
    assert all(check["passed"] and only in check["check"] for check in found["checks"])
    ours = [case for case in found["cases"] if case["contender"] == "twinstream"]
    assert ours
    assert all(case["ms"] > 0 and case["times_ours"] == 1 for case in ours)
    plain = [case for case in found["cases"] if case["contender"].startswith(("plain", "matmul")) and "ms" in case]
    assert plain


def test_its_kernels_are_imported_without_numpy() -> None:
    """The interpreter needs it, a GPU does not."""
    missing = "('numpy', 'torchvision', 'numba',"
    without_numpy = WITHOUT_THEM.replace("('numba',", missing).split("import tests.interpreter")[0]
    assert "'numpy'" in without_numpy
    command = [
        sys.executable,
        "-c",
        without_numpy + "import benchmarks.gpu_cases, benchmarks.gpu_kernels, kernels.photometric",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    finished = run()
    assert finished.returncode == 2
    assert "no CUDA device" in finished.stderr


def test_the_loader_benchmark_runs_to_its_table(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    write_photos(tmp_path / "photos", 24)
    results = tmp_path / "results.json"
    options = ["--data", str(tmp_path / "photos"), "--workers", "1", "--rounds", "2", "--json", str(results)]
    done = subprocess.run(
        [sys.executable, "benchmarks/loaders.py", *options, "--only", "decoding alone"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "images/CPU-s" in done.stdout
    rows = json.loads(results.read_text())["rows"]
    assert [row["contender"] for row in rows] == ["ours, whole", "torchvision", "FFCV, fast DCT"]
    assert rows[0]["ratio"] == 1
    assert all(0 < row["share_of_decoding"] <= 1 for row in rows)
    assert all(row["images_per_cpu_second"] > 10 for row in rows)
