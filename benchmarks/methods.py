"""All methods at an equal budget on a CPU: the small ResNet, small heads, the same images, epochs and optimizer.

    python benchmarks/methods.py digits --json FILE
    python benchmarks/methods.py cifar10 --data data/cifar10-jpeg --json FILE

Trains configs/compare/SET/METHOD.yaml with `train.py`, scores it with `evaluate.py`, and prints a table against the
untrained encoder. Digits: three seeds. CIFAR-10: one, 5,000 images, 6 epochs, about ten minutes a method and core.
Runs and scores are kept in --runs; what is there already is neither trained nor scored again. `--data`: a copy of
CIFAR-10 stored as image files; without it the original is taken from $TWINSTREAM_DATA or ./data. What a method costs:
benchmarks/method_costs.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SEEDS = {"digits": (0, 1, 2), "cifar10": (0,)}
RANDOM = "random encoder"


@dataclass(frozen=True)
class Job:
    """One method on one set with one seed."""

    data: str
    method: str
    seed: int
    runs: Path
    overrides: tuple[str, ...]  # of the recipe's data section

    @property
    def folder(self) -> Path:
        return self.runs / f"{self.data}-{self.method}-seed{self.seed}".replace(" ", "-")

    def run(self) -> dict[str, Any]:
        """Train and score, each unless that is done."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        kept = self.folder.with_suffix(".json")
        if kept.exists():
            row: dict[str, Any] = json.loads(kept.read_text())
            return row
        if self.method == RANDOM:
            base = ["--data", str(recipe(self.data, "simclr")), *self.overrides, f"seed={self.seed}"]
            target = ["--baseline", "random", *base]
        else:
            settings = [f"run.dir={self.folder}", f"seed={self.seed}", *self.overrides]
            if not (self.folder / "encoder.safetensors").exists():
                self.python("train.py", str(recipe(self.data, self.method)), *settings)
            target = [str(self.folder)]
        scores = {"kNN": self.score("knn", *target)}
        if self.data == "digits":
            scores["linear, 10 per class"] = self.score("linear", *target, "labels=10-per-class")
        row = {"data": self.data, "method": self.method, "seed": self.seed, **scores}
        kept.write_text(json.dumps(row))
        return row

    def score(self, protocol: str, *arguments: str) -> float:
        result = json.loads(self.python("evaluate.py", protocol, *arguments).splitlines()[-1])
        return float(result["value"])

    def python(self, script: str, *arguments: str) -> str:
        """Run a script of the repository on one thread; returns its standard output."""
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *arguments], cwd=ROOT, env=one_thread, capture_output=True, text=True
        )
        with (self.folder.parent / f"{self.folder.name}.log").open("a") as log:
            log.write(f"$ {script} {' '.join(arguments)}\n{done.stdout}{done.stderr}")
        if done.returncode:
            raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
        return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SEEDS)
    parser.add_argument("--methods", nargs="+", default=None, help="default: all that have a recipe")
    parser.add_argument("--data", type=Path, help="cifar10: a folder with train/ and test/ of class folders")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"))
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread at a time")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    known = sorted(path.stem for path in recipe(options.set, "base").parent.glob("*.yaml") if path.stem != "base")
    methods = options.methods or known
    if unknown := set(methods) - set(known):
        parser.error(f"no recipe for {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    overrides: tuple[str, ...] = ()
    if options.data is not None:
        overrides = ("data.source=folder", f"data.root={options.data.resolve()}")
    jobs = [
        Job(options.set, method, seed, options.runs.resolve(), overrides)
        for method in [RANDOM, *methods]
        for seed in SEEDS[options.set]
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(Job.run, jobs))
    Console().print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps({"set": options.set, "rows": rows}, indent=1) + "\n")


def summary(rows: list[dict[str, Any]]) -> Table:
    """Means over seeds, with the standard error where there are several, and the gain over the random encoder."""
    scores = [key for key in rows[0] if key not in ("data", "method", "seed")]
    table = Table(title=f"test top-1 (%) on {rows[0]['data']}, kNN and linear as evaluate.py has them")
    for column in ("method", *scores, "kNN over random"):
        table.add_column(column)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    random = statistics.mean(row["kNN"] for row in groups[RANDOM])
    for method, group in groups.items():
        gain = f"{statistics.mean(row['kNN'] for row in group) - random:+.1f}" if method != RANDOM else ""
        table.add_row(method, *(spread([row[score] for row in group]) for score in scores), gain)
    return table


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) / len(values) ** 0.5:.1f}"


def recipe(data: str, method: str) -> Path:
    return ROOT / "configs" / "compare" / data / f"{method}.yaml"


if __name__ == "__main__":
    main()
