"""What methods add to a training step on a CPU: CPU time of the addition against that of the encoder's step.

    python benchmarks/method_costs.py [--only nnclr] [--rounds 3] [--json FILE]

The step is forward and backward of a ResNet-18 on two views of 256 images of 32 pixels, on one thread. Both are taken
in turns, as CPU time of the process, which a busy machine disturbs less than the time of day. A share is the median
over the rounds. To add a case, write a function and list it in CASES.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Run, machine
from kernels import SupportSet, bregman_loss
from trainers.encoders import EncoderConfig, build_encoder
from trainers.parts.prototypes import Prototypes
from trainers.parts.subnetworks import Subnetworks, SubnetworksConfig
from trainers.parts.winners import usage_divergence, winner_statistics


@dataclass(frozen=True)
class Cost:
    added: Run  # what the method does in a step beyond encoder and heads
    at_most: float | None = None  # share of the encoder's step


def nnclr_lookup(small: bool) -> Cost:
    """The neighbours of both views among 65,536 projections, an image's own left out, as NNCLR stores and asks."""
    size, batch = (512, 16) if small else (65_536, 256)
    support = SupportSet(size, 256)
    support.enqueue(torch.randn(size, 256), torch.arange(size))
    z, ids = torch.randn(2 * batch, 256), torch.arange(batch).repeat(2)
    return Cost(lambda: support.nearest(z, exclude_ids=ids), at_most=0.15)


def kmclr_lookup_and_update(small: bool) -> Cost:
    """The nearest of 400 centres for both views, and the update by the first."""
    batch = 16 if small else 256
    prototypes = Prototypes(400, 256, classes=100, batch_size=batch, reseed_every=2000)
    z, labels = torch.randn(2 * batch, 256), torch.arange(batch) % 100
    while not prototypes.is_ready:
        prototypes.update(z[:batch], labels)

    def added() -> None:
        prototypes.same_class(prototypes.assign(z), labels.repeat(2))
        prototypes.update(z[:batch], labels)

    return Cost(added)


def beclr_subnetworks(small: bool) -> Cost:
    """200 subnetworks of widths 512 and 1 on both views' projections and the losses of their scores, there and back."""
    batch, count = (16, 8) if small else (256, 200)
    subnetworks = Subnetworks(128, SubnetworksConfig(count=count))
    z = torch.randn(2 * batch, 128, requires_grad=True)

    def added() -> None:
        subnetworks.zero_grad()
        scores = subnetworks(z)
        first, second = scores.chunk(2)
        weights = (scores / 0.1).softmax(1)
        loss = bregman_loss(first, second, temperature=0.1, weights=weights)
        (loss + 0.1 * usage_divergence(scores, 0.1)).backward()
        winner_statistics(first, second)

    return Cost(added, at_most=0.1)


CASES: dict[str, Callable[[bool], Cost]] = {
    "nnclr: lookup, 65,536 x 256": nnclr_lookup,
    "kmclr: lookup and update, 400 x 256": kmclr_lookup_and_update,
    "beclr: 200 subnetworks [512, 1]": beclr_subnetworks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure({name: make for name, make in CASES.items() if options.only in name}, options.rounds, options.small)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


def measure(cases: dict[str, Callable[[bool], Cost]], rounds: int, small: bool) -> list[dict[str, Any]]:
    step, costs = encoder_step(small), {name: make(small) for name, make in cases.items()}
    runs = {"": step} | {name: cost.added for name, cost in costs.items()}
    for run in runs.values():
        run()
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            spent[name].append(time.process_time() - start)
    return [
        {
            "case": name,
            "step_cpu_ms": 1000 * statistics.median(spent[""]),
            "added_cpu_ms": 1000 * statistics.median(spent[name]),
            "share": statistics.median(added / of for added, of in zip(spent[name], spent[""], strict=True)),
            "at_most": cost.at_most,
        }
        for name, cost in costs.items()
    ]


def encoder_step(small: bool) -> Run:
    """As the engine runs it: float32, channels_last."""
    encoder = build_encoder(EncoderConfig(arch="resnet18"), 32).to(memory_format=torch.channels_last)
    views = torch.randn(2 * (16 if small else 256), 3, 32, 32).to(memory_format=torch.channels_last)

    def run() -> None:
        encoder.zero_grad()
        encoder(views).square().mean().backward()

    return run


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="CPU time added to a step: ResNet-18, two views of 256 images of 32 pixels, one thread")
    table.add_column("case")
    for heading in ("step, ms", "added, ms", "share", "target"):
        table.add_column(heading, justify="right")
    for row in rows:
        target = row["at_most"]
        judged = "" if target is None else f"< {target:.0%} {'reached' if row['share'] < target else 'MISSED'}"
        figures = f"{row['step_cpu_ms']:,.0f}", f"{row['added_cpu_ms']:,.1f}", f"{row['share']:.2%}"
        table.add_row(row["case"], *figures, judged)
    console = Console()
    (console if console.is_terminal else Console(width=130)).print(table)


if __name__ == "__main__":
    main()
