"""Every Triton kernel compiles for the GPUs it is meant for, keeps its registers and fits into shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
TENSOR_CORES = ("contrastive", "ntxent", "nearest", "simplex", "kmeans")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_and_fit(arch: int, tmp_path: Path) -> None:
    report = tmp_path / "kernels.json"
    # In a process of its own: this one may hold interpreted kernels, which no compiler takes.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernels", "--arch", str(arch), "--json", str(report)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if arch == 100 and "is not defined for option 'gpu-name'" in run.stderr:
        pytest.skip("the installed ptxas does not know sm_100")
    assert report.exists(), run.stdout + run.stderr
    found = json.loads(report.read_text())
    problems = [f"{one['case']} ({one['config']}): {one['problem']}" for one in found if one["problem"]]
    assert not problems, "\n".join(problems)
    assert run.returncode == 0, run.stderr
    with_products = {one["case"]: one["tensor_cores"] for one in found if one["case"].startswith(TENSOR_CORES)}
    assert with_products
    assert all(with_products.values()), with_products
