"""Images/s of whole SimCLR training on a CPU, from stored JPEGs: ours, the SimCLR code bases' plain loop, lightly's.

    pip install -e .[bench]
    python benchmarks/end_to_end.py --cifar FOLDER --photos FOLDER [--rounds 5] [--only stub] [--json FILE]

The same encoder, resolution, batch, views and number of threads for all; each in a process of its own, taking turns
at a few steps, so that all see the same machine. While one has its turn the others are stopped, their workers too:
else what one prepares ahead would be paid for by the next. Two cores are bound by the encoder, so everything is
measured a second time with a stub of one layer in its place: that shows what loading, augmentation, loss and optimizer
cost. Compiling and the first turn are not counted, nor is opening the set: ours decodes CIFAR-10 there, once, into
memory, where the others decode an image in every step; hence ours is measured a second time, decoding as they do.
Memory is of the training, and pages that contenders share are divided among them. A ratio is the median over the
rounds of ours over theirs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine
from benchmarks.loaders import one_pass

NAMES = {
    "ours": "ours",
    "decoding": "ours, decoding in every step",
    "plain": "the SimCLR code bases' plain loop",
    "lightly": "lightly",
}


@dataclass(frozen=True)
class Case:
    data: str  # cifar or photos
    arch: str  # an encoder of ours, or stub
    size: int
    batch: int
    steps: int  # of a turn

    @property
    def name(self) -> str:
        return f"{self.data}, {self.arch}, {self.size} px, batch {self.batch}"


CASES = [
    Case("cifar", "resnet8x4", 32, 128, steps=4),
    Case("photos", "resnet8x4", 224, 50, steps=4),
    Case("cifar", "stub", 32, 128, steps=40),
    Case("photos", "stub", 224, 50, steps=30),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as a folder of class folders of JPEG files")
    parser.add_argument("--photos", type=Path, help="photographs, likewise")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads or processes of each (default 2)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, in each (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    folders = {"cifar": options.cifar, "photos": options.photos}
    rows = []
    for case in CASES:
        if options.only in case.name and folders[case.data] is not None:
            rows += measure(case, folders[case.data].resolve(), options)
    if not rows:
        raise SystemExit("nothing to measure: give --cifar, --photos or both")
    result = {"machine": machine() | {"threads": options.threads, "workers": options.workers}, "rows": rows}
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def measure(case: Case, data: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("end_to_end_contenders.py")
    environment = dict(os.environ, OMP_NUM_THREADS=str(options.threads))
    running = {}
    for name in NAMES:
        if name == "decoding" and case.data != "cifar":  # as "ours" does there already
            continue
        facts = [case.arch, case.size, case.batch, options.workers, case.steps]
        process = subprocess.Popen(
            [sys.executable, str(script), name, str(data), *map(str, facts)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        if turn(process) is None:
            if name in ("ours", "decoding"):
                raise SystemExit(f"{NAMES[name]}: did not start")
            print(f"left out: {NAMES[name]} (is it installed?)", file=sys.stderr)
            continue
        running[name] = process
    found: dict[str, list[dict[str, float]]] = {name: [] for name in running}
    try:
        for done in range(options.rounds):
            print(f"{case.name}: round {done + 1} of {options.rounds}", file=sys.stderr, flush=True)
            for name, process in running.items():
                answer = turn(process)
                if answer is None:
                    raise SystemExit(f"{NAMES[name]} ended in the middle")
                found[name].append(answer)
    finally:  # one that is stopped would never notice that nobody asks any more
        for process in running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return [row(case, name, answers, found["ours"]) for name, answers in found.items()]


def turn(process: subprocess.Popen[str]) -> dict[str, float] | None:
    """Let a contender and its workers run until its next answer; None: it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGCONT)
    answer = one_pass(process)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # the signal takes a moment
    return answer


def row(case: Case, name: str, answers: list[dict[str, float]], ours: list[dict[str, float]]) -> dict[str, Any]:
    def ratio(unit: str) -> float:
        return statistics.median(theirs[unit] / mine[unit] for theirs, mine in zip(answers, ours, strict=True))

    return {
        "case": case.name,
        "contender": NAMES[name],
        "images_per_second": statistics.median(one["images"] / one["wall"] for one in answers),
        "images_per_cpu_second": statistics.median(one["images"] / one["cpu"] for one in answers),
        "ratio": ratio("wall"),
        "cpu_ratio": ratio("cpu"),
        "peak_mb": max(one["peak_mb"] for one in answers),
    }


def show(result: dict[str, Any]) -> None:
    facts = result["machine"]
    table = Table(title=f"{facts['threads']} threads, {facts['workers']} workers, {facts['processor']}")
    table.add_column("what")
    table.add_column("who")
    for column in ("images/s", "images/CPU-s", "times ours: wall", "CPU", "peak MB"):
        table.add_column(column, justify="right")
    before = None
    for one in result["rows"]:
        if before not in (None, one["case"]):
            table.add_section()
        before = one["case"]
        table.add_row(
            one["case"],
            one["contender"],
            f"{one['images_per_second']:,.0f}",
            f"{one['images_per_cpu_second']:,.0f}",
            f"{one['ratio']:.2f}",
            f"{one['cpu_ratio']:.2f}",
            f"{one['peak_mb']:,.0f}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
