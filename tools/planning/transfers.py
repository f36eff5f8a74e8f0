"""What the ranks send each other in one optimizer step, whatever the method; ``tools.planning.methods`` has the losses.

The formulas repeat what the code does, and tests/tools/test_plan.py holds them against what real ranks send.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.recipe import Recipe
from tools.planning.model import Model

# The kinds of traffic, in the order of the tables.
EMBEDDINGS = "embeddings"
GRADIENTS = "gradients on embeddings"
LOG_SUMS = "log-sum-exps"
MATRICES = "matrices of inner products"
QUEUE = "rows for queue or centres"
BATCHNORM = "BatchNorm"
WEIGHTS = "gradients on weights"
SCALARS = "scalars, counts, shapes"
MONITORS = "probe, MINE"
CONTROL = "control flags"
KINDS = (EMBEDDINGS, GRADIENTS, LOG_SUMS, MATRICES, QUEUE, BATCHNORM, WEIGHTS, SCALARS, MONITORS, CONTROL)

REDUCE, GATHER = "all_reduce", "all_gather_into_tensor"
SCATTER, EXCHANGE = "reduce_scatter_tensor", "all_to_all_single"


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a step."""

    ranks: int
    images: int  # of this rank, in all its micro-batches
    device: str  # cuda, whose kernels are Triton's, or cpu
    half: bool  # 16-bit autocast
    element: int = 4  # bytes of a weight

    @property
    def batch(self) -> int:
        return self.ranks * self.images


@dataclass(frozen=True, slots=True)
class Transfer:
    """A collective, ``times`` a step."""

    kind: str
    collective: str
    size: int  # bytes of the tensor that all ranks share: gathered, to be scattered, or reduced
    times: int = 1

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, and as many that it receives, by rings: no algorithm needs fewer."""
        passes = 2 if self.collective == REDUCE else 1
        return passes * self.size * self.times * (ranks - 1) / ranks

    def within(self, ranks: int, a_node: int) -> tuple[float, float]:
        """Bytes over one rank's link and bytes that leave its node: a ring enters and leaves a node once."""
        sent = self.sent(ranks)
        if ranks <= a_node:
            return sent, 0.0
        outside = sent
        if self.collective == EXCHANGE:  # pairwise: each of the node's ranks has its own for each of the others
            outside = self.size * self.times * a_node * (ranks - a_node) / ranks
        return sent, outside


def engine_transfers(share: Share, model: Model, recipe: Recipe) -> list[Transfer]:
    """What the training loop, DeepSpeed and BatchNorm send; nothing if there is one rank."""
    if share.ranks == 1:
        return []
    engine = recipe.engine
    forwards, backwards = passes(model, engine.accumulation)
    found = _batchnorm(share, model, forwards, backwards) if engine.batchnorm == "sync" else []
    weights = Transfer(WEIGHTS, REDUCE, model.parameters * share.element)
    found.append(weights)
    if engine.zero_stage:  # DeepSpeed reduces whole gradients all the same, at stage 2 after each backward pass
        found += [weights] * (backwards - 1 if engine.zero_stage == 2 else 0)
        found.append(Transfer(SCALARS, REDUCE, 4, 2))
        found += [Transfer(WEIGHTS, GATHER, group * share.element) for group in model.groups]
    found.append(Transfer(CONTROL, REDUCE, 3 * 8))  # a rank was told to stop, a checkpoint is due, one is being written
    if engine.nonfinite == "skip":
        found.append(Transfer(CONTROL, REDUCE, 8))
    return found


def passes(model: Model, accumulation: int) -> tuple[int, int]:
    """Forward and backward passes of a step: with micro-batches, or parts whose losses do not add up, in two rounds."""
    chunks = accumulation * model.parts
    if accumulation == 1 and (model.parts == 1 or model.separable):
        return chunks, chunks
    return 2 * chunks, chunks


def monitor_transfers(share: Share, model: Model, recipe: Recipe) -> list[Transfer]:
    """What the online probe and MINE send in every step."""
    if share.ranks == 1:
        return []
    found, d = [], model.features
    if model.classes > 1:
        found += [
            Transfer(MONITORS, REDUCE, 4, 2),
            Transfer(MONITORS, REDUCE, 4 * model.classes * d),
            Transfer(MONITORS, REDUCE, 4 * model.classes),
        ]
    if recipe.monitor.mine:
        width = 512  # of trainers.mine.Mine
        found += [Transfer(MONITORS, GATHER, share.ranks * size) for size in (4 * d, 4)]
        sizes = (1, 2 * d * width, width, width * width, width, width)
        found += [Transfer(MONITORS, REDUCE, 4 * size) for size in sizes]
    return found


def _batchnorm(share: Share, model: Model, forwards: int, backwards: int) -> list[Transfer]:
    found = []
    for channels in model.norms:
        if share.device == "cuda":  # there the statistics of every rank are gathered
            found.append(Transfer(BATCHNORM, GATHER, 4 * (2 * channels + 1) * share.ranks, forwards))
            found.append(Transfer(BATCHNORM, REDUCE, 4 * 2 * channels, backwards))
        else:
            found.append(Transfer(BATCHNORM, REDUCE, 8 * (2 * channels + 1), forwards))
            found.append(Transfer(BATCHNORM, REDUCE, 8 * 2 * channels, backwards))
    return found
