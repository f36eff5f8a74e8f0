"""What grows with the ranks, as `tools.plan` has it, and with the steps of a run."""

from __future__ import annotations

import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.growth_fit import Expected, Growth
from benchmarks.growth_probe import in_child
from configs.recipe import load_recipe, read_recipe
from tools.planning.estimate import Cluster, Estimate, estimate
from tools.planning.model import model_of
from tools.planning.transfers import BATCHNORM, EMBEDDINGS, LOG_SUMS, MATRICES, WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
RANKS = tuple(1 << power for power in range(1, 11))
BATCH_PER_RANK = 64
IMAGES = 1_281_167

COUNTED = 1.0  # byte: these are formulas
SENT = {
    "simclr: sent, embeddings": (EMBEDDINGS, 1, "each rank gets the rows of all others"),
    "simclr: sent, log-sum-exps": (LOG_SUMS, 1, "a number of each row, to all"),
    "simclr: sent, BatchNorm": (
        BATCHNORM,
        1,
        "nn.SyncBatchNorm gathers every rank's statistics; on CPUs they are added up",
    ),
    "simclr: sent, weights' gradients": (
        WEIGHTS,
        0,
        "a ring's all-reduce sends the weights twice, less a rank's share",
    ),
}


def of_ranks() -> list[Growth]:
    """Of a rank and step, ResNet-50, 64 images a rank."""
    path = ROOT / "configs/imagenet"
    simclr, mvmr = (_estimates(path / name) for name in ("resnet50_100ep.yaml", "mvmr.yaml"))

    found = [
        _ranks(name, [one.sent[kind] for one in simclr], exponent, why) for name, (kind, exponent, why) in SENT.items()
    ]
    why = "each of its rows is compared with those of all"
    found.append(_ranks("simclr: the loss", [one.loss_flops for one in simclr], 1, why, "FLOP"))
    why = "the rows of all, beside the weights"
    weights = [sum(size for name, size in one.held.items() if "weights" in name or "flat" in name) for one in simclr]
    held = [sum(one.held.values()) - own for one, own in zip(simclr, weights, strict=True)]
    found.append(_ranks("simclr: held for the loss", held, 1, why))
    found.append(_ranks("simclr: held for the weights", weights, 0, "every rank has all of them"))
    why = "the inner products of all rows with all are added up over the ranks"
    found.append(_ranks("mvmr: sent, inner products", [one.sent[MATRICES] for one in mvmr], 2, why))
    return found


def _estimates(path: Path) -> list[Estimate]:
    recipe = read_recipe(path, [])
    model = model_of(recipe, images=IMAGES, classes=1000, size=224)
    cluster = Cluster(IMAGES, 8, "cuda", BATCH_PER_RANK, {})
    return [estimate(recipe, model, cluster, ranks) for ranks in RANKS]


def _ranks(name: str, values: Sequence[float], exponent: float, why: str, unit: str = "bytes") -> Growth:
    return Growth("ranks", name, "ranks", unit, RANKS, tuple(values), Expected(exponent, why, floor=COUNTED))


# ---- a run ----------------------------------------------------------------------------------------------

STEPS = tuple(1 << power for power in range(3, 10))
RUN = [
    "batch_size=32",
    "views.size=8",
    "monitor.every_epochs=1000",
    "checkpoint.every_epochs=null",
    "checkpoint.every_minutes=null",
    "log.every_steps=8",
]


def of_a_run() -> list[Growth]:
    """The digits' recipe with batches of 32, by the loop of train.py; at each size, since the size before."""
    # Not forked: backward passes of whole networks refuse to run where one has run before the fork.
    seconds, resident = in_child(_trained, fresh=True)
    return [
        Growth(
            "run", "a step", "steps", "CPU s", STEPS, seconds, Expected(0, "a step does not know how many came before")
        ),
        Growth(
            "run", "memory of the process", "steps", "bytes", STEPS, resident, Expected(0, "nothing is kept of a step")
        ),
    ]


def _trained() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """CPU seconds of a step, and the process's memory, at each of STEPS."""
    from train import build_run
    from trainers.engine import joined_ranks
    from trainers.pretrain import pretrain

    recipe = load_recipe(ROOT / "configs/quickstart.yaml", RUN)
    clock: list[float] = []
    memory: list[float] = []
    process = psutil.Process()
    with (
        tempfile.TemporaryDirectory(prefix="twinstream-growth-") as folder,
        joined_ranks(recipe.engine) as ranks,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        run = build_run(recipe, Path(folder), ranks)
        run.epochs = -(-(STEPS[-1] + 1) // run.loader.steps_per_epoch)
        schedule = run.schedule

        def timed(step: int) -> float:  # asked once a step, before it
            clock.append(time.process_time())
            memory.append(float(process.memory_info().rss))
            return schedule(step)

        run.schedule = timed
        pretrain(run)
    steps = [after - before for before, after in itertools.pairwise(clock)]
    starts = [STEPS[0] // 2, *STEPS]
    spent = tuple(statistics.median(steps[start:end]) for start, end in zip(starts, STEPS, strict=False))
    return spent, tuple(memory[end] for end in STEPS)
