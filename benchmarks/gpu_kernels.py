"""The first parts of `benchmarks/gpu.py`: what the card can do, whether every kernel is right, and how fast it is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

from benchmarks import gpu_cases, gpu_checks
from benchmarks.gpu_record import NO_TIME, Record
from kernels.fused.tuning import choices, forget_choices

COPY_BYTES = 2**30
MATMUL_SIDE = 8192
# Dense bfloat16 TFLOP/s with float32 accumulation, by NVIDIA's data sheets; the first name that is in the device's.
DATA_SHEETS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
}


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


def data_sheet_tflop_s(device: str) -> float | None:
    """None where the data sheet is not known here."""
    return next((rate for name, rate in DATA_SHEETS.items() if name in device), None)


def measure_limits(record: Record, device: torch.device, smoke: bool) -> None:
    """The rates of a large copy and of large matrix products, and the data sheet's of the latter."""
    count, side = (2**16, 64) if smoke else (COPY_BYTES, MATMUL_SIDE)
    source = torch.empty(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    limits: dict[str, float | None] = {
        "copy_gb_s": 2 * count / milliseconds(lambda: target.copy_(source), device) / 1e6
    }
    for name, dtype in (("matmul_tflop_s", torch.float16), ("matmul_bf16_tflop_s", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        limits[name] = 2 * side**3 / milliseconds(lambda a=a, b=b: a @ b, device) / 1e9  # type: ignore[misc]
    about = environment(device)
    limits["data_sheet_bf16_tflop_s"] = data_sheet_tflop_s(about["device"])
    record.put("environment", record.found.get("environment", {}) | about)
    record.put("limits", limits)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(", ".join(f"{name} {value:.4g}" for name, value in limits.items() if value is not None))


def run_checks(record: Record, device: torch.device, smoke: bool) -> None:
    """Every kernel on fresh random inputs, by the seed of the record, against float64."""
    # The checks are of many shapes: to tune each would take minutes. The sizes that are timed are tuned.
    os.environ["TWINSTREAM_AUTOTUNE"] = "0"
    for check in gpu_checks.checks(device, record.found["environment"]["seed"], smoke):
        if not record.wanted(check.name):
            continue
        if not record.in_time():
            record.add("checks", {"check": check.name, "missing": NO_TIME})
            continue
        try:
            error, problem = check.error(), ""
        except Exception as failure:  # the others are still worth knowing
            error, problem = float("nan"), f"{type(failure).__name__}: {failure}"
        passed = error <= check.allowed
        record.add(
            "checks",
            {"check": check.name, "error": error, "allowed": check.allowed, "passed": passed, "problem": problem},
        )
        print(f"{'ok  ' if passed else 'FAIL'} {check.name:62s} {error:9.1e} of {check.allowed:.0e} {problem[:300]}")
    del os.environ["TWINSTREAM_AUTOTUNE"]
    forget_choices()


def run_cases(record: Record, device: torch.device, smoke: bool) -> None:
    limits = record.found["limits"]
    for case in gpu_cases.cases(device, smoke):
        if not record.wanted(case.name):
            continue
        floor = max(case.operations / limits["matmul_tflop_s"] / 1e9, case.moved / limits["copy_gb_s"] / 1e6)
        print(f"\n{case.name}: floor {floor:.3f} ms")
        ours = None
        for name, make in case.contenders.items():
            row: dict[str, Any] = {"case": case.name, "contender": name, "floor_ms": floor}
            row |= record.attempt(lambda make=make: measure(make, device))  # type: ignore[misc]
            if "ms" in row:
                ours = ours or row["ms"]
                row["times_ours"] = row["ms"] / ours
                if case.operations:
                    row["tflop_s"] = case.operations / row["ms"] / 1e9
            record.add("cases", row)
            print("    " + describe(row))
    record.put("configurations", choices())


def measure(make: Callable[[], Callable[[], Any]], device: torch.device) -> dict[str, Any]:
    """Milliseconds of what ``make`` returns and, on a GPU, the megabytes that it adds at its peak."""
    run = make()
    spent = milliseconds(run, device)
    if device.type != "cuda":
        return {"ms": spent}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return {"ms": spent, "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}


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
