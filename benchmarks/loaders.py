"""Images per CPU-second from stored JPEGs to two views of 224 pixels: ours, torchvision, DALI, FFCV, in one run.

    pip install -e .[dali,ffcv]
    python benchmarks/loaders.py --data FOLDER_OF_JPEGS [--workers 2] [--rounds 7] [--only crops] [--json FILE]

The folder is converted to each format first. Then the contenders, each in a process of its own, take turns at going
once over all images, so that all see the same machine. What they compile and cache is done in a first pass, which is
not counted (its seconds are in the table), and leaves the files in the page cache. CPU-seconds are of all threads and
worker processes. A ratio is the median over the rounds of ours over theirs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.table import Table

from benchmarks.harness import machine

OPTIONS = {
    "files": None,
    "ffcv": ["--to", "ffcv", "--max-side", "0"],  # every JPEG as it is
    "ffcv q90": ["--to", "ffcv", "--jpeg", "encode", "--max-side", "500"],
    "ffcv q90 256": ["--to", "ffcv", "--jpeg", "encode", "--max-side", "256"],
    "ffcv raw 256": ["--to", "ffcv", "--write-mode", "raw", "--max-side", "256"],
    "webdataset": ["--to", "webdataset", "--max-side", "0"],
    "tfrecord": ["--to", "tfrecord", "--max-side", "0"],
}


@dataclass
class Contender:
    part: str  # views (crops and photometry), crops, or decoding
    name: str
    store: str
    maker: str
    further: dict[str, Any] = field(default_factory=dict)
    target: float | None = None  # least ratio of the part's first contender to this one


def contenders() -> list[Contender]:
    views, crops = "SimCLR views", "two uint8 crops"
    return [
        Contender(views, "ours: ffcv + photometric", "ffcv", "ours", {"loader": "ffcv", "whole": True}),
        Contender(views, "ours: native + photometric", "files", "ours", {"loader": "native", "whole": True}),
        Contender(views, "torchvision v2 + DataLoader", "files", "torchvision", {"whole": True}, target=5.0),
        Contender(views, "DALI, all of it", "files", "dali", {"whole": True}, target=3.5),
        Contender(crops, "ours: ffcv", "ffcv", "ours", {"loader": "ffcv", "whole": False}),
        Contender(crops, "ours: native", "files", "ours", {"loader": "native", "whole": False}),
        Contender(crops, "ours: native", "webdataset", "ours", {"loader": "native", "whole": False}),
        Contender(crops, "ours: native", "tfrecord", "ours", {"loader": "native", "whole": False}),
        Contender(crops, "ours: dali", "files", "ours", {"loader": "dali", "whole": False}),
        Contender(crops, "ours: plain", "files", "ours", {"loader": "plain", "whole": False}),
        Contender(crops, "FFCV, a decode a view", "ffcv", "ffcv", target=1.5),
        Contender(crops, "DALI", "files", "dali", {"whole": False}, target=1.6),
        Contender(crops, "torchvision v2 + DataLoader", "files", "torchvision", {"whole": False}),
        *(
            Contender(f"{crops}, {store[5:]}", name, store, maker, further)
            for store in ("ffcv q90", "ffcv q90 256", "ffcv raw 256")
            for name, maker, further in (
                ("ours: ffcv", "ours", {"loader": "ffcv", "whole": False}),
                ("FFCV, a decode a view", "ffcv", {}),
            )
        ),
        Contender("decoding alone", "ours, whole", "ffcv", "decoding", {"decode": "ours"}),
        Contender("decoding alone", "torchvision", "ffcv", "decoding", {"decode": "torchvision"}),
        Contender("decoding alone", "FFCV, fast DCT", "ffcv", "decoding", {"decode": "ffcv"}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of class folders of .JPEG files")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes of every contender (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="passes of every contender (default 7)")
    parser.add_argument("--only", default="", help="the parts whose name contains this")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [one for one in contenders() if options.only in one.part or one.part == "decoding alone"]
        stores = {name: convert(options.data, Path(folder), name) for name in {one.store for one in chosen}}
        rows = measure(chosen, stores, options)
    result = {"machine": machine() | {"threads": options.workers} | versions(), "rows": rows}
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def convert(data: Path, folder: Path, name: str) -> Path:
    options = OPTIONS[name]
    if options is None:
        return data
    target = folder / name.replace(" ", "-")
    command = [sys.executable, "-m", "tools.convert", str(data), str(target), *options]
    root = Path(__file__).resolve().parent.parent
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{finished.stdout}{finished.stderr}")
    return target


def measure(chosen: list[Contender], stores: dict[str, Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    running = []
    script = Path(__file__).with_name("loader_contenders.py")
    for one in chosen:
        start = time.perf_counter()
        arguments = [one.maker, str(stores[one.store].resolve()), str(options.workers), json.dumps(one.further)]
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if one_pass(process) is None:
            print(f"left out: {one.name} on {one.store} (is it installed?)", file=sys.stderr)
            continue
        running.append((one, process, time.perf_counter() - start))
    rates: list[list[float]] = [[] for _ in running]
    walls: list[list[float]] = [[] for _ in running]
    for turn in range(options.rounds):
        print(f"round {turn + 1} of {options.rounds}", file=sys.stderr, flush=True)
        for place, (one, process, _) in enumerate(running):
            answer = one_pass(process)
            if answer is None:
                raise SystemExit(f"{one.name} on {one.store} ended in the middle")
            rates[place].append(answer["images"] / answer["cpu"])
            walls[place].append(answer["images"] / answer["wall"])
    for _, process, _ in running:
        process.communicate()
    first: dict[str, int] = {}
    for place, (one, _, _) in enumerate(running):
        first.setdefault(one.part, place)
    bounds = [place for place, (one, _, _) in enumerate(running) if one.part == "decoding alone"]
    return [
        {
            "part": one.part,
            "contender": one.name,
            "store": one.store,
            "images_per_cpu_second": statistics.median(rates[place]),
            "images_per_second": statistics.median(walls[place]),
            "ratio": statistics.median(a / b for a, b in zip(rates[first[one.part]], rates[place], strict=True)),
            "target": one.target,
            # Of the fastest whole decode of the same JPEGs, in the same round.
            "share_of_decoding": statistics.median(
                rate / max(rates[b][turn] for b in bounds) for turn, rate in enumerate(rates[place])
            ),
            "start_seconds": start,
        }
        for place, (one, _, start) in enumerate(running)
    ]


def one_pass(process: subprocess.Popen[str]) -> dict[str, float] | None:
    """None: the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write("\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None
    line = process.stdout.readline()
    return json.loads(line) if line else None


def versions() -> dict[str, str]:
    found = {}
    for name in ("torchvision", "nvidia-dali-cuda130", "ffcv", "numba"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['machine']['threads']} workers, {result['machine']['processor']}")
    table.add_column("what")
    table.add_column("who")
    for column in ("images/CPU-s", "images/s", "times ours", "target", "of decoding", "first pass, s"):
        table.add_column(column, justify="right")
    part = None
    for row in result["rows"]:
        if part not in (None, row["part"]):
            table.add_section()
        part = row["part"]
        table.add_row(
            f"{row['part']} from {row['store']}",
            row["contender"],
            f"{row['images_per_cpu_second']:.0f}",
            f"{row['images_per_second']:.0f}",
            f"{row['ratio']:.2f}",
            "" if row["target"] is None else f"{row['target']:.1f}",
            f"{row['share_of_decoding']:.0%}",
            f"{row['start_seconds']:.0f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
