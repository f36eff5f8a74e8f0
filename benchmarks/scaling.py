"""Weak scaling on one machine's CPUs: a recipe with as many images a rank, on one process and on two.

    python benchmarks/scaling.py [RECIPE.yaml] [key=value …] [--batch-per-rank 64] [--json FILE]

Three settings take turns, each process with one thread: one process alone; two that train for themselves, which share
the machine and nothing else; two ranks of one run over gloo. The second against the first is what the machine takes,
the third against the second what the ranks cost each other. Collectives are timed as each rank waits in them, so the
time includes waiting for the other. The steps are those of train.py: loader, views, loss, optimizer, online probe, and
whether to stop; checkpoints and evaluations are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine
from configs.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "configs/quickstart.yaml"
LARGER = ["views.size=32"]  # digits enlarged, so that a step is one of a small network and not of nothing
SETTINGS = {"one process": (1, False), "two, each for itself": (2, False), "two ranks": (2, True)}
WARM_UP = 2  # steps
PATIENCE = 300  # seconds to wait for a process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=RECIPE)
    parser.add_argument("overrides", nargs="*", help=f"of the recipe; {LARGER[0]} unless a recipe is given")
    parser.add_argument("--batch-per-rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="that are timed, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.recipe == RECIPE and not options.overrides:
        options.overrides = LARGER
    if options.worker is not None:
        work(options)
        return
    rows = measure(options)
    show(rows, options)
    if options.json:
        alone = rows[0]
        source = (
            f"one CPU thread, {options.recipe} {' '.join(options.overrides)}, {options.batch_per_rank} images a step"
        )
        content = {
            "machine": machine() | {"threads": 1},
            "recipe": options.recipe,
            "overrides": options.overrides,
            "batch_per_rank": options.batch_per_rank,
            "steps": options.steps,
            "rounds": options.rounds,
            "rows": rows,
            "rates": {"images_per_second": {"value": alone["images_per_second"], "unit": "images/s", "source": source}},
        }
        options.json.write_text(json.dumps(content, indent=2) + "\n")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a setting: medians over all timed steps of all rounds and processes."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for _ in range(options.rounds):
        for name, (processes, together) in SETTINGS.items():
            found[name] += run_processes(options, processes, together)
    rows = []
    for name, (processes, _) in SETTINGS.items():
        seconds = [step for worker in found[name] for step in worker["seconds"]]
        waited = [step for worker in found[name] for step in worker["waited"]]
        step = statistics.median(seconds)
        rows.append(
            {
                "setting": name,
                "processes": processes,
                "step_ms": 1000 * step,
                "fastest_ms": 1000 * min(seconds),
                "images_per_second": processes * options.batch_per_rank / step,
                "collectives": found[name][0]["collectives"],
                "bytes": found[name][0]["bytes"],
                "collectives_ms": 1000 * statistics.median(waited),
                "share_of_collectives": sum(waited) / sum(seconds),
            }
        )
    for row in rows:
        row["efficiency"] = rows[0]["step_ms"] / row["step_ms"]
    return rows


def run_processes(options: argparse.Namespace, processes: int, together: bool) -> list[dict[str, Any]]:
    """Start them, let them all begin at once when each is ready, and return what they measured."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        base = [sys.executable, str(Path(__file__).resolve()), options.recipe, *options.overrides]
        base += ["--batch-per-rank", str(options.batch_per_rank), "--steps", str(options.steps), "--worker", folder]
        started = []
        for rank in range(processes):
            own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": "0", "PROCESS": str(rank)}
            own |= {"RANK": str(rank), "WORLD_SIZE": str(processes)} if together else {"RANK": "0", "WORLD_SIZE": "1"}
            threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
            environment = os.environ | own | threads | {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
            started.append(subprocess.Popen(base, cwd=ROOT, env=environment))
        try:
            _wait(lambda: len(list(Path(folder).glob("ready-*"))) == processes, started)
            Path(folder, "go").touch()
            for process in started:
                if process.wait(PATIENCE):
                    raise SystemExit(f"a process ended with code {process.returncode}; what it said is above")
        finally:
            for process in started:
                process.kill()
        return [json.loads(Path(folder, f"result-{rank}").read_text()) for rank in range(processes)]


def work(options: argparse.Namespace) -> None:
    """One process: warm up, wait for the others, time the steps."""
    torch.set_num_threads(1)
    from tools.planning.recording import recorded
    from tools.tuning.batch_size import endless
    from train import build_run
    from trainers.engine import joined_ranks
    from trainers.step import train_step

    rank, world = os.environ["PROCESS"], int(os.environ["WORLD_SIZE"])
    batch = f"batch_size={options.batch_per_rank * world}"
    recipe = load_recipe(Path(options.recipe), [*options.overrides, batch])
    with recorded() as calls, joined_ranks(recipe.engine) as ranks, contextlib.redirect_stdout(io.StringIO()):
        run = build_run(recipe, options.worker, ranks)
        run.method.train()
        seconds, waited, size, count = [], [], 0, 0
        with contextlib.closing(endless(run.loader)) as batches:
            for step in range(WARM_UP + options.steps):
                if step == WARM_UP:
                    Path(options.worker, f"ready-{rank}").touch()
                    _wait(Path(options.worker, "go").exists, [])
                calls.clear()
                start = time.perf_counter()
                result = train_step(run.engine, run.method, next(batches), run.schedule(step))
                run.monitor.observe(result)
                ranks.highest(False, False, False)  # as trainers.pretrain, in every step
                if step >= WARM_UP:
                    seconds.append(time.perf_counter() - start)
                    waited.append(sum(call.seconds for call in calls))
                    size, count = sum(call.size for call in calls), len(calls)
        run.loader.close()
        ranks.barrier()
    result_file = Path(options.worker, f"result-{rank}")
    result_file.write_text(json.dumps({"seconds": seconds, "waited": waited, "bytes": size, "collectives": count}))


def _wait(done: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        if any(process.poll() for process in processes):
            raise SystemExit("a process failed; what it said is above")
        if time.monotonic() > deadline:
            raise SystemExit(f"processes were not ready after {PATIENCE} s")
        time.sleep(0.05)


def show(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    recipe = " ".join([options.recipe, *options.overrides])
    table = Table(title=f"{recipe}: {options.batch_per_rank} images a process and step, one thread each")
    table.add_column("setting")
    for heading in ("step, ms", "images/s", "efficiency", "collectives", "bytes", "in collectives"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = f"{row['step_ms']:,.0f}", f"{row['images_per_second']:,.1f}", f"{row['efficiency']:.0%}"
        sent = f"{row['collectives']}", f"{row['bytes']:,}", f"{row['share_of_collectives']:.1%}"
        table.add_row(row["setting"], *cells, *sent)
    console = Console()
    (console if console.is_terminal else Console(width=130)).print(table)


if __name__ == "__main__":
    main()
