"""Every fused kernel on one GPU: first right, then fast, against its floor and against what one would use otherwise.

    python3 benchmarks/gpu.py [--json FILE] [--only nearest] [--skip-checks]

Needs python3 with torch >= 2.11 and triton >= 3.6, nothing else. Rivals that are installed are timed as well: lightly,
inf-cl (which takes float32), cut-cross-entropy, flashlib, flash-kmeans, kornia.

Floors are computed from what this card does: operations over the rate of a large matrix product, bytes over the rate of
a large copy, both measured first. Times are medians of CUDA events (triton.testing.do_bench, caches cleared between
calls). Errors are relative to float64 on the same card. With --smoke everything is tiny, and runs without a GPU too,
under Triton's interpreter: that shows only that this script works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--smoke" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
import triton

from benchmarks import gpu_cases, gpu_checks
from kernels.fused.tuning import choices, forget_choices

COPY_BYTES = 2**30
MATMUL_SIDE = 8192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--only", default="", help="the checks and cases whose name contains this")
    parser.add_argument("--skip-checks", action="store_true", help="times only")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does this script run?")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the checks' inputs")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.smoke:
        print("no CUDA device; `benchmarks/kernels.py` is for the CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    about = environment(device) | {"seed": options.seed}
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    limits = measure_limits(device, options.smoke)
    print(f"copy {limits['copy_gb_s']:.0f} GB/s, float16 matrix product {limits['matmul_tflop_s']:.0f} TFLOP/s")

    checked = []
    if not options.skip_checks:
        # The checks are of many shapes: to tune each would take minutes. The sizes that are timed are tuned.
        os.environ["TWINSTREAM_AUTOTUNE"] = "0"
        checked = run_checks(gpu_checks.checks(device, options.seed, options.smoke), options.only)
        os.environ["TWINSTREAM_AUTOTUNE"] = "1"
        forget_choices()
    timed = run_cases(gpu_cases.cases(device, options.smoke), options.only, limits, device)

    seconds = time.perf_counter() - began
    failed = [check for check in checked if not check["passed"]]
    print(f"{len(checked) - len(failed)} of {len(checked)} checks passed; {seconds:.0f} s in all")
    if options.json:
        found = {"environment": about, "limits": limits, "checks": checked, "cases": timed, "seconds": seconds}
        found["configurations"] = choices()
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if failed else 0


def environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, interpreted"
    return {
        "device": name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        return float(triton.testing.do_bench(run, warmup=25, rep=200, return_mode="median"))
    run()
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def measure_limits(device: torch.device, smoke: bool) -> dict[str, float]:
    count, side = (2**16, 64) if smoke else (COPY_BYTES, MATMUL_SIDE)
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), device)
    a, b = (torch.randn(side, side, device=device).half() for _ in range(2))
    product = milliseconds(lambda: a @ b, device)
    return {"copy_gb_s": 2 * count / copy / 1e6, "matmul_tflop_s": 2 * side**3 / product / 1e9}


def run_checks(checks: Iterable[gpu_checks.Check], only: str) -> list[dict[str, Any]]:
    results = []
    for check in checks:
        if only not in check.name:
            continue
        try:
            error, problem = check.error(), ""
        except Exception as failure:  # the others are still worth knowing
            error, problem = float("nan"), f"{type(failure).__name__}: {failure}"
        passed = error <= check.allowed
        results.append(
            {"check": check.name, "error": error, "allowed": check.allowed, "passed": passed, "problem": problem}
        )
        print(f"{'ok  ' if passed else 'FAIL'} {check.name:62s} {error:9.1e} of {check.allowed:.0e} {problem[:300]}")
    return results


def run_cases(
    cases: Iterable[gpu_cases.Case], only: str, limits: dict[str, float], device: torch.device
) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        if only not in case.name:
            continue
        floor = max(case.operations / limits["matmul_tflop_s"] / 1e9, case.moved / limits["copy_gb_s"] / 1e6)
        print(f"\n{case.name}: floor {floor:.3f} ms")
        ours = None
        for name, make in case.contenders.items():
            row: dict[str, Any] = {"case": case.name, "contender": name, "floor_ms": floor} | measure(make, device)
            if "ms" in row:
                ours = ours or row["ms"]
                row["times_ours"] = row["ms"] / ours
                if case.operations:
                    row["tflop_s"] = case.operations / row["ms"] / 1e9
            results.append(row)
            print("    " + describe(row))
    return results


def measure(make: Callable[[], Callable[[], Any]], device: torch.device) -> dict[str, Any]:
    try:
        run = make()
    except ImportError:
        return {"missing": "not installed"}
    try:
        spent = milliseconds(run, device)
        if device.type != "cuda":
            return {"ms": spent}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return {"ms": spent, "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"missing": "out of memory"}
    except Exception as failure:  # a rival's, most likely
        return {"missing": f"{type(failure).__name__}: {str(failure)[:200]}"}


def describe(row: dict[str, Any]) -> str:
    if "missing" in row:
        return f"{row['contender']:28s} {row['missing']}"
    parts = [f"{row['contender']:28s} {row['ms']:9.3f} ms {row['times_ours']:7.2f}x"]
    if "tflop_s" in row:
        parts.append(f"{row['tflop_s']:7.1f} TFLOP/s")
    parts.append(f"{row['ms'] / row['floor_ms']:7.1f}x the floor")
    if "peak_mb" in row:
        parts.append(f"{row['peak_mb']:9.1f} MB")
    return "  ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
