"""Every kernel on the CPU against what one would use otherwise: time, error and memory, in one run.

    pip install -e .[bench]
    python benchmarks/kernels.py [--threads 1 2] [--only ntxent] [--json FILE]

Contenders take turns, so that all see the same machine; a ratio is the median over the rounds of their time over ours.
Errors are relative to float64. Memory is the peak of one call above a process that has made a tiny one and holds the
inputs: the median of three fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cpu_cases import cases
from benchmarks.harness import machine, measure, median_of_fresh_processes, peak_above_warm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of all libraries (default 1 2)")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)  # this script calling itself: …
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)  # … threads and memory need fresh processes
    options = parser.parse_args()
    if options.memory_of:
        torch.set_num_threads(1)
        case, contender = options.memory_of
        print(peak_above_warm(next(one for one in cases() if one.name == case), contender))
    elif options.within:
        options.within.write_text(json.dumps(run(options)))
    else:
        found = [in_fresh_process(options, threads) for threads in options.threads]
        for one in found:
            show(one)
        if options.json:
            options.json.write_text(json.dumps(found, indent=2) + "\n")


def in_fresh_process(options: argparse.Namespace, threads: int) -> dict[str, Any]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        command = [sys.executable, __file__, "--within", str(results), "--only", options.only]
        command += ["--threads", str(threads)] + ["--no-memory"] * options.no_memory
        subprocess.run(command, check=True, env={**os.environ, **dict.fromkeys(names, str(threads))})
        loaded: dict[str, Any] = json.loads(results.read_text())
        return loaded


def run(options: argparse.Namespace) -> dict[str, Any]:
    threads = options.threads[0]
    torch.set_num_threads(threads)
    rows = []
    for case in cases():
        if options.only not in case.name or case.threads not in (None, threads):
            continue
        print(f"{threads} thread(s): {case.name}", file=sys.stderr, flush=True)
        measured = measure(case)
        for row in measured:
            row["target"] = row["target"] if threads == (case.threads or 1) else None
            # Memory does not depend on the threads: once is enough.
            if row["contender"] in case.memory and not options.no_memory and case.threads in (None, threads):
                command = [sys.executable, __file__, "--memory-of", case.name, row["contender"]]
                row["peak_mb"] = median_of_fresh_processes(command)
        rows += measured
    return {"machine": machine(), "rows": rows}


def show(found: dict[str, Any]) -> None:
    about = found["machine"]
    table = Table(title=f"{about['processor']}, {about['threads']} thread(s), PyTorch {about['torch']}")
    table.add_column("case")
    table.add_column("contender")
    for heading in ("ms", "times ours", "target", "error", "peak MB"):
        table.add_column(heading, justify="right")
    for row in found["rows"]:
        target, error, peak = row["target"], row["error"], row.get("peak_mb")
        reached = target is not None and row["ratio"] >= target
        table.add_row(
            row["case"],
            row["contender"],
            f"{row['ms']:.2f}",
            f"{row['ratio']:.2f}",
            "" if target is None else f">= {target} {'reached' if reached else 'MISSED'}",
            "" if error is None else f"{error:.0e}",
            "" if peak is None else f"{peak:.0f}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=130)).print(table)


if __name__ == "__main__":
    main()
