"""Evaluation on the CPU against scikit-learn and against one thing at a time, in one run.

    OMP_NUM_THREADS=2 python benchmarks/evaluation.py [--only knn] [--json FILE]

Contenders take turns; a ratio is the median over the rounds of their time over ours. Features are synthetic: ten
overlapping classes in 512 dimensions of uneven variance, of which logistic regression gets three quarters right.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from benchmarks.harness import Case, Run, machine, measure, median_of_fresh_processes, peak_above_warm
from trainers.encoders import EncoderConfig, build_encoder
from trainers.head_grid import Head, HeadGrid, grid
from trainers.knn import knn_rankings
from trainers.linear import L2_GRID, fit_logistic

CPU = torch.device("cpu")
FIVE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # L2 strengths that scikit-learn is given
FORTY = grid(("pooled",), tuple(10.0 ** (step / 5) for step in range(-10, 10)), (0.0, 1e-5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)  # this script calling itself
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    if options.memory_of:
        name, contender = options.memory_of
        print(peak_above_warm(next(case for case in cases() if case.name == name), contender))
        return
    rows = []
    for case in cases():
        if options.only in case.name:
            rows += measure(case)
            for row in rows:
                if row["case"] == case.name and row["contender"] in case.memory:
                    command = [sys.executable, __file__, "--memory-of", case.name, row["contender"]]
                    row["peak_mb"] = median_of_fresh_processes(command)
    scores = accuracies() if options.only in "linear" else {}
    table = Table("case", "contender", "ms", "their time / ours", "target", "peak MB")
    for row in rows:
        peak = f"{row['peak_mb']:,.0f}" if "peak_mb" in row else ""
        target = f"{row['target']:g}" if row["target"] else ""
        table.add_row(row["case"], row["contender"], f"{row['ms']:,.0f}", f"{row['ratio']:.2f}", target, peak)
    Console().print(table)
    for name, score in scores.items():
        print(f"test accuracy at the strength that is best on other images, {name}: {score:.2f} %")
    if options.json:
        found = {"machine": machine(), "rows": rows, "accuracy": scores}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def cases() -> list[Case]:
    return [
        Case("linear: L2 strengths, 10,000 x 512 x 10", _strengths, 5, targets={"scikit-learn, 5 strengths": 1.0}),
        Case("heads: 40 on cached features, an epoch of 10,000 x 512", _heads, 5, targets={"one after the other": 2.0}),
        Case("heads: with the encoder, 512 images of 32 pixels", _with_encoder, 5, targets={"1 head": 1 / 1.3}),
        Case(
            "knn: 10,000 queries, 50,000 x 512, k = 200",
            _neighbours,
            3,
            targets={"scikit-learn, brute force": 1.0},
            memory=("ours", "scikit-learn, brute force"),
        ),
    ]


def made(count: int, seed: int, width: int = 512) -> tuple[Tensor, Tensor]:
    """Features [N, d] and labels [N]; the classes and the mixing are the same for all seeds."""
    fixed = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=fixed) * torch.logspace(0, -2, width)
    centres = 0.12 * torch.randn(10, width, generator=fixed)
    drawn = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=drawn)
    return (torch.randn(count, width, generator=drawn) + centres[labels]) @ mixing, labels


def _strengths(small: bool) -> Mapping[str, Run]:
    features, labels = made(200 if small else 10_000, 1)
    inputs = _standardised(features, features).numpy()

    def theirs() -> None:
        for l2 in FIVE:
            LogisticRegression(C=1 / (l2 * len(inputs))).fit(inputs, labels)

    return {
        f"ours, {len(L2_GRID)} strengths": partial(fit_logistic, features, labels, 10, L2_GRID),
        "scikit-learn, 5 strengths": theirs,
    }


def accuracies() -> dict[str, float]:
    """Each at the strength that is best on held-out images: what the shortcuts of either cost."""
    (features, labels), (held, held_labels), (test, test_labels) = (
        made(n, s) for n, s in ((10_000, 1), (2_000, 2), (20_000, 3))
    )

    def right(logits: Tensor, truth: Tensor) -> float:
        return 100 * (logits.argmax(1) == truth).double().mean().item()

    fit = max(fit_logistic(features, labels, 10, L2_GRID), key=lambda fit: right(fit.logits(held), held_labels))
    inputs, chosen_on, other = (_standardised(x, features).numpy() for x in (features, held, test))
    fits = [LogisticRegression(C=1 / (l2 * len(inputs)), max_iter=1000).fit(inputs, labels) for l2 in L2_GRID]
    best = max(fits, key=lambda fit: fit.score(chosen_on, held_labels))
    return {
        f"ours, {len(L2_GRID)} strengths": right(fit.logits(test), test_labels),
        f"scikit-learn, the same {len(L2_GRID)}": 100 * best.score(other, test_labels),
    }


def _standardised(features: Tensor, by: Tensor) -> Tensor:
    return (features - by.mean(0)) / by.std(0, unbiased=False)


def _heads(small: bool) -> Mapping[str, Run]:
    features, labels = made(512 if small else 10_000, 1)
    batches = list(zip(features.split(256), labels.split(256), strict=True))

    def epoch(heads: list[Head]) -> None:
        together = HeadGrid(heads, {"pooled": 512}, 10, optimizer="sgd", device=CPU)
        for rows, truth in batches:
            together.step({"pooled": rows}, truth)

    def alone() -> None:
        for head in FORTY:
            epoch([head])

    def modules() -> None:
        for head in FORTY:
            linear = nn.Linear(512, 10)
            optimizer = torch.optim.SGD(linear.parameters(), head.lr, momentum=0.9, weight_decay=head.weight_decay)
            for rows, truth in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(linear(rows), truth).backward()
                optimizer.step()

    return {"ours, together": partial(epoch, FORTY), "one after the other": alone, "torch.nn.Linear, SGD": modules}


def _with_encoder(small: bool) -> Mapping[str, Run]:
    encoder = build_encoder(EncoderConfig(arch="resnet8x4"), 32).eval().to(memory_format=torch.channels_last)
    count = 32 if small else 512
    images = torch.randn(count, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (count,))

    @torch.no_grad()
    def epoch(heads: list[Head]) -> None:
        together = HeadGrid(heads, {"pooled": 256}, 10, optimizer="sgd", device=CPU)
        for batch, truth in zip(images.split(256), labels.split(256), strict=True):
            together.step({"pooled": encoder(batch)}, truth)

    return {"40 heads": partial(epoch, FORTY), "1 head": partial(epoch, FORTY[:1])}


def _neighbours(small: bool) -> Mapping[str, Run]:
    bank, labels = made(1000 if small else 50_000, 1)
    queries, _ = made(10 if small else 10_000, 2)
    ours = partial(knn_rankings, queries, bank, labels, classes=10, settings=[(200, 0.07)], device=CPU)

    def theirs() -> None:
        reference = KNeighborsClassifier(200, weights=_weights, metric="cosine", algorithm="brute")
        reference.fit(bank.numpy(), labels).predict(queries.numpy())

    return {"ours": ours, "scikit-learn, brute force": theirs}


def _weights(distance: object) -> object:
    return torch.as_tensor(distance).neg().div(0.07).exp().numpy()


if __name__ == "__main__":
    main()
