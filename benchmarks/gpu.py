"""One GPU, from single kernels to training: first right, then fast, against its floor and what one would use otherwise.

    python3 benchmarks/gpu.py --json gpu.json
    python3 benchmarks/gpu.py --json gpu.json --data CIFAR10      the speedrun as well
    python3 benchmarks/gpu.py --json gpu.json --only kernels --match nearest

Needs python3 with torch >= 2.11, torchvision and triton >= 3.6, nothing else. Rivals that are installed are timed as
well: lightly, inf-cl (which takes float32), cut-cross-entropy, flashlib, flash-kmeans, kornia.

    checks    every fused kernel on fresh random inputs, against float64 on the same card
    kernels   its time and memory, its rivals', and the floor: operations over the rate of a large matrix product, or
              bytes over the rate of a large copy, both measured first
    training  resnet50 and resnet18: whole steps of SimCLR on crops that lie on the card, with FLOPs, MFU and memory,
              eager, compiled and as one CUDA graph, and what their parts take; engine: train.py's own step beside a
              bare one, where DeepSpeed is installed
    speedrun  benchmarks/cifar_speedrun.py, if --data says where CIFAR-10 is

Every part runs in a process of its own and gets a share of --minutes. What fails is a row that says so, what there was
no time for as well, and the file is written after every row. An image is two views: images/s are pairs of views/s.
With --smoke everything is tiny, and runs without a GPU too, under Triton's interpreter: that shows only that this
script works.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--smoke" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from benchmarks.gpu_kernels import measure_limits, run_cases, run_checks
from benchmarks.gpu_record import Record
from benchmarks.stand_ins import pydantic_or_stand_in

ROOT = Path(__file__).resolve().parent.parent
GRACE = 15.0  # seconds that a part may take beyond its share before it is killed
LIMITS_SECONDS = 25.0  # for the first part: no other can do without it


@dataclass(frozen=True)
class Part:
    group: str
    weight: float  # its share of the time, among the parts that are still to come


PARTS = {
    "limits": Part("limits", 0.1),  # always: the others are measured against them
    "checks": Part("checks", 2),  # 160 kernels are compiled
    "kernels": Part("kernels", 2),
    "resnet50": Part("training", 2.5),
    "resnet18": Part("training", 1.2),
    "engine": Part("training", 0.6),
    "speedrun": Part("speedrun", 4),
}


def main() -> int:
    parser = make_parser()
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.smoke:
        print("no CUDA device; `benchmarks/kernels.py` is for the CPU", file=sys.stderr)
        return 2
    if options.part:
        run_part(
            options.part, Record(options.json, resumed=True, seconds=options.seconds, match=options.match), options
        )
        return 0
    names = chosen_parts(parser, options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended as well
    with tempfile.TemporaryDirectory() as folder:
        options.json = options.json or Path(folder, "found.json")
        try:
            record = Record(options.json, resumed=False)
        except OSError as error:
            parser.error(f"--json: {options.json} cannot be written: {error.strerror}")
        return run_parts(names, record, options)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write what is found there, row by row")
    parser.add_argument("--only", default="", metavar="PARTS", help="these alone, such as checks,kernels")
    parser.add_argument("--skip", default="", metavar="PARTS", help="all but these, such as training,speedrun")
    parser.add_argument(
        "--match", default="", metavar="TEXT", help="the checks, cases and steps whose name contains it"
    )
    parser.add_argument("--minutes", type=float, default=8.5, help="in all, about (default: 8.5)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10, for the speedrun")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the checks' inputs")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does this script run?")
    parser.add_argument("--one-process", action="store_true", help="all parts in this process, without its protection")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


def chosen_parts(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The names of the parts to run, in their order; ends the program with one line where the options make no sense."""
    groups = {part.group for part in PARTS.values()} | PARTS.keys()
    only, skip = ({name for name in getattr(options, option).split(",") if name} for option in ("only", "skip"))
    if unknown := (only | skip) - groups:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(sorted(groups))}")
    if not 0 < options.minutes < math.inf:
        parser.error(f"--minutes is {options.minutes}, expected a finite number above 0")
    if options.data is None and "speedrun" in only:
        parser.error("the speedrun needs --data DIR, where CIFAR-10 is")
    if options.data is not None and not options.data.exists():
        parser.error(f"--data: there is no {options.data}")
    names = []
    for name, part in PARTS.items():
        wanted = not only or not only.isdisjoint({name, part.group})
        left_out = not skip.isdisjoint({name, part.group}) or (name == "speedrun" and options.data is None)
        if name == "limits" or (wanted and not left_out):
            names.append(name)
    if names == ["limits"] and "limits" not in only:
        parser.error("--only and --skip together leave nothing to do")
    return names


def run_parts(names: list[str], record: Record, options: argparse.Namespace) -> int:
    """One after the other; 1 if a check failed or a part ended before its time."""
    began = time.monotonic()
    record.put("environment", {"seed": options.seed, "settings": pydantic_or_stand_in()})
    problems = []
    for number, name in enumerate(names):
        left = began + 60 * options.minutes - time.monotonic()
        weights = [PARTS[part].weight for part in names[number:]]
        least = LIMITS_SECONDS if name == "limits" and not options.smoke else 0.0
        seconds = max(least, left * weights[0] / sum(weights))
        print(f"\n== {name}, {seconds:.0f} s at most", flush=True)
        start = time.monotonic()
        if options.one_process:
            problem = in_this_process(name, record, options)
        else:
            problem = in_a_child(command(name, seconds, options), seconds + GRACE)
            record.found = json.loads(record.path.read_text())
            if name == "speedrun":
                take_speedrun(record)
        took = time.monotonic() - start
        record.add("parts", {"part": name, "seconds": took, "share": seconds, "problem": problem})
        if problem:
            problems.append(name)
            print(f"{name}: {problem}", flush=True)
    checked = record.found.get("checks", [])
    missing = sum("missing" in check for check in checked)
    passed = sum(bool(check.get("passed")) for check in checked)
    record.put("seconds", time.monotonic() - began)
    print(f"\n{passed} of {len(checked)} checks passed, {missing} not made; {record.found['seconds']:.0f} s in all")
    if options.match and not any(record.found.get(section) for section in ("checks", "cases", "training", "engine")):
        print(f"--match: nothing in these parts has {options.match!r} in its name", file=sys.stderr)
        return 2
    return 1 if problems or passed + missing < len(checked) else 0


def command(name: str, seconds: float, options: argparse.Namespace) -> list[str]:
    """What runs one part in a process of its own."""
    words = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--seconds", f"{seconds:.1f}"]
    words += ["--json", str(options.json), "--match", options.match]
    words += ["--smoke"] if options.smoke else []
    return words + (["--data", str(options.data)] if options.data else [])


def in_a_child(words: list[str], seconds: float) -> str:
    """Run to the end, or kill it with all that it started; what went wrong, or nothing."""
    child = subprocess.Popen(words, start_new_session=True)
    try:
        code = child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"killed after {seconds:.0f} s; the rows before are there"
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return "" if code == 0 else f"ended with code {code}; the rows before are there"


def in_this_process(name: str, record: Record, options: argparse.Namespace) -> str:
    record.match = options.match
    try:
        run_part(name, record, options)
    except (Exception, SystemExit) as failure:
        return f"{type(failure).__name__}: {str(failure)[:300]}"
    return ""


def run_part(name: str, record: Record, options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "speedrun":
        run_speedrun(record, options)
        return
    runs: dict[str, Callable[[Record, torch.device, bool], None]] = {
        "limits": measure_limits,
        "checks": run_checks,
        "kernels": run_cases,
    }
    if PARTS[name].group == "training":
        runs |= training_parts()
    runs[name](record, device, options.smoke)


def training_parts() -> dict[str, Callable[[Record, torch.device, bool], None]]:
    """Imported here, since the other parts need neither torchvision nor the settings of a run."""
    pydantic_or_stand_in()
    from benchmarks.gpu_engine import run_engine
    from benchmarks.gpu_training import run_resnet18, run_resnet50

    return {"resnet50": run_resnet50, "resnet18": run_resnet18, "engine": run_engine}


def run_speedrun(record: Record, options: argparse.Namespace) -> None:
    """As a program of its own, the run for linear 83 % alone; what it wrote goes into the record, killed or not."""
    written = speedrun_file(record)
    minutes = max(0.1, (record.deadline - time.monotonic()) / 60)
    words = [sys.executable, str(ROOT / "benchmarks" / "cifar_speedrun.py"), "--data", str(options.data)]
    words += ["--json", str(written), "--minutes", f"{minutes:.2f}", "--run", "short"]
    code = subprocess.run([*words, *(["--smoke"] if options.smoke else [])]).returncode
    take_speedrun(record, code)
    if code:
        raise SystemExit(f"benchmarks/cifar_speedrun.py ended with code {code}")


def speedrun_file(record: Record) -> Path:
    return record.path.with_name(f"{record.path.stem}.speedrun.json")


def take_speedrun(record: Record, code: int | None = None) -> None:
    """What the speedrun wrote becomes a part of the record; ``code`` it ended with, None: it was killed."""
    written = speedrun_file(record)
    if code is None and not written.exists():
        return
    found: dict[str, Any] = {"code": code}
    if written.exists():
        found["found"] = json.loads(written.read_text())
        written.unlink()
    record.put("speedrun", found)


if __name__ == "__main__":
    sys.exit(main())
