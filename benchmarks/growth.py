"""How costs grow with batch, queue, data set, ranks, resolution and steps: exponents, expected and fitted.

    python benchmarks/growth.py [--only loss,queue,data,ranks,resolution,run] [--json FILE] [--picture FILE]

On one thread of a CPU. Each point is a process of its own; time is CPU time, memory the peak above code and inputs. An
exponent is fitted, by least squares of the logarithms, over the upper half of the sizes (of their logarithms), where
constant costs matter least; less than 1 MiB counts as 1 MiB. What grows faster than expected is marked MORE, and the
exit code is then 1. All of it takes about ten minutes. `--small` leaves out large sizes: to see that it runs.
docs/throughput/growth.md says what each line means.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Before PyTorch is imported: what has threads cannot be forked.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["NUMBA_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.growth_cases import LOSSES, QUEUES, resolutions
from benchmarks.growth_data import cases as of_the_data
from benchmarks.growth_fit import LEAST_POINTS, Growth
from benchmarks.growth_picture import draw
from benchmarks.growth_probe import Case, ProbeError
from benchmarks.growth_runs import of_a_run, of_ranks
from benchmarks.harness import machine

CASES: dict[str, Callable[[], list[Case]]] = {
    "loss": lambda: LOSSES,
    "queue": lambda: QUEUES,
    "data": of_the_data,
    "resolution": resolutions,
}
OTHERS: dict[str, Callable[[], list[Growth]]] = {"ranks": of_ranks, "run": of_a_run}
GROUPS = "loss", "queue", "data", "ranks", "resolution", "run"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=_groups, default=GROUPS, help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--picture", type=Path, help="draw the curves there, as PNG, PDF or SVG")
    parser.add_argument("--small", action="store_true", help="the three smallest sizes of each")
    options = parser.parse_args(arguments)
    for path in (options.json, options.picture):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: there is no folder {path.absolute().parent}")
    if options.picture is not None and options.picture.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--picture {options.picture}: expected a name that ends in .png, .pdf or .svg")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        found = [growth for group in GROUPS if group in options.only for growth in measure(group, options.small)]
    except ProbeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(found)
    if options.json:
        content = {"machine": machine(), "curves": [growth.to_json() for growth in found]}
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.picture:
        draw(found, options.picture)
    return int(any(growth.verdict == "MORE" for growth in found))


def _groups(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    unknown = [name for name in chosen if name not in GROUPS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not known; choose from {','.join(GROUPS)}")
    return chosen


def measure(group: str, small: bool) -> list[Growth]:
    if group in OTHERS:
        print(group, file=sys.stderr, flush=True)
        return OTHERS[group]()
    found = []
    for case in CASES[group]():
        print(f"{group}: {case.name}", file=sys.stderr, flush=True)
        found += (replace(case, sizes=case.sizes[:LEAST_POINTS]) if small else case).grown()
    return found


def show(found: list[Growth]) -> None:
    table = Table(title="Exponents of cost: expected, and fitted from the size given on")
    for heading in ("group", "what", "of"):
        table.add_column(heading)
    for heading in ("smallest", "largest", "expected", "fitted", "from"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    group = ""
    for growth in found:
        ends = (
            f"{growth.sizes[place]:,} {growth.along}: {written(growth.values[place], growth.unit)}" for place in (0, -1)
        )
        exponents = f"{growth.expected.exponent:g}", f"{growth.fitted:.2f}", f"{growth.fitted_from:,}"
        what = {"CPU s": "CPU time", "bytes": "memory" if growth.group != "ranks" else "bytes", "FLOP": "FLOP"}
        table.add_row(
            growth.group if growth.group != group else "",
            growth.name,
            what[growth.unit],
            *ends,
            *exponents,
            growth.verdict,
        )
        group = growth.group
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)


def written(value: float, unit: str) -> str:
    """With a prefix, three digits: 1.23 ms, 45.6 MB."""
    unit = {"CPU s": "s", "bytes": "B", "FLOP": "FLOP"}[unit]
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m"), (1e-6, "µ")):
        if value >= factor and (unit != "s" or factor <= 1):
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value * 1e9:.3g} n{unit}" if value else f"0 {unit}"


if __name__ == "__main__":
    sys.exit(main())
