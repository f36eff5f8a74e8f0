"""NT-Xent in tiles against the plain loss that holds the 2N x 2N matrix: time, error and memory, in one run.

    python benchmarks/ntxent.py [--threads 1] [--json FILE]

Times are medians over repeats in which the two take turns, so that both see the same machine. Memory is the
peak of one forward and backward pass above the process that holds the inputs, each in a process of its own.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kernels import ntxent

TEMPERATURE = 0.1
DIMENSION = 128
REPEATS = {512: 200, 2048: 30, 8192: 5}  # by 2N
MEMORY_ROWS = 16384


def plain(z1: Tensor, z2: Tensor) -> Tensor:
    """The loss as one would write it in PyTorch."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


def tiled(z1: Tensor, z2: Tensor) -> Tensor:
    return ntxent(z1, z2, temperature=TEMPERATURE, backend="tiled")


LOSSES = {"tiled": tiled, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (default 1)")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--memory-of", choices=LOSSES, help=argparse.SUPPRESS)  # this script calling itself
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_above_inputs(LOSSES[options.memory_of]))
        return

    # Memory first: Linux hands a new process the peak of the one that started it.
    memory = {name: memory_in_fresh_process(name, options.threads) for name in LOSSES}
    speed = [compare(rows, repeats) for rows, repeats in REPEATS.items()]
    show(speed, memory, options.threads)
    if options.json:
        results = {
            "threads": options.threads,
            "torch": torch.__version__,
            "dimension": DIMENSION,
            "temperature": TEMPERATURE,
            "forward_and_backward": speed,
            "peak_memory_mb": {"rows": MEMORY_ROWS, **memory},
        }
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def make_views(rows: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z1 = torch.randn(rows // 2, DIMENSION)
    z2 = z1 + torch.randn(rows // 2, DIMENSION)
    return z1.requires_grad_(), z2.requires_grad_()


def forward_and_backward(loss: Callable[[Tensor, Tensor], Tensor], z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(z1, z2)
    return value.detach(), torch.cat(torch.autograd.grad(value, (z1, z2)))


def compare(rows: int, repeats: int) -> dict[str, float]:
    z1, z2 = make_views(rows)
    exact, exact_gradient = forward_and_backward(
        plain, z1.detach().double().requires_grad_(), z2.detach().double().requires_grad_()
    )
    result: dict[str, float] = {"rows": rows}
    for name, loss in LOSSES.items():  # this warms up, too
        value, gradient = forward_and_backward(loss, z1, z2)
        result[f"{name}_loss_error"] = (abs(value - exact) / exact).item()
        result[f"{name}_gradient_error"] = ((gradient - exact_gradient).norm() / exact_gradient.norm()).item()
    times: dict[str, list[float]] = {name: [] for name in LOSSES}
    for _ in range(repeats):
        for name, loss in LOSSES.items():
            start = time.perf_counter()
            forward_and_backward(loss, z1, z2)
            times[name].append(1000 * (time.perf_counter() - start))
    for name in LOSSES:
        result[f"{name}_ms"] = statistics.median(times[name])
        result[f"{name}_fastest_ms"] = min(times[name])
    result["speedup"] = result["plain_ms"] / result["tiled_ms"]
    return result


def peak_above_inputs(loss: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Megabytes that one forward and backward pass adds to a process which has run a tiny one already."""
    z1, z2 = make_views(MEMORY_ROWS)
    forward_and_backward(loss, *make_views(8))
    before = peak_resident()
    # Gradients included; without the concatenation of the timing, which is no part of either loss.
    torch.autograd.grad(loss(z1, z2), (z1, z2))
    return (peak_resident() - before) / 1e6


def peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def memory_in_fresh_process(name: str, threads: int) -> float:
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", name]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return float(run.stdout)


def show(speed: list[dict[str, float]], memory: dict[str, float], threads: int) -> None:
    table = Table(title=f"NT-Xent forward + backward, float32, D = {DIMENSION}, τ = {TEMPERATURE}, threads: {threads}")
    for heading in ("2N", "plain ms", "tiled ms", "speedup"):
        table.add_column(heading, justify="right")
    for heading in ("loss error", "gradient error"):
        table.add_column(f"{heading}: plain", justify="right")
        table.add_column("tiled", justify="right")
    for row in speed:
        table.add_row(
            str(row["rows"]),
            f"{row['plain_ms']:.2f}",
            f"{row['tiled_ms']:.2f}",
            f"{row['speedup']:.2f}x",
            *(f"{row[f'{name}_{what}_error']:.1e}" for what in ("loss", "gradient") for name in ("plain", "tiled")),
        )
    console = Console()
    console.print(table)
    console.print(
        f"Peak memory above the inputs at 2N = {MEMORY_ROWS}: "
        f"tiled {memory['tiled']:.0f} MB, plain {memory['plain']:.0f} MB. Errors are relative to float64."
    )


if __name__ == "__main__":
    main()
