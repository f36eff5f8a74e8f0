"""A run at so many ranks: what it sends, holds and takes, and where a part of it becomes a large share of the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from configs.recipe import Recipe
from pipelines.order import count_steps
from tools.planning.methods import loss_cost
from tools.planning.model import Model
from tools.planning.rates import Rates, known
from tools.planning.transfers import (
    EMBEDDINGS,
    GRADIENTS,
    KINDS,
    LOG_SUMS,
    MATRICES,
    Share,
    Transfer,
    engine_transfers,
    monitor_transfers,
    passes,
)

PARTS = ("encoder", "loss", "network")  # of a step, one after the other; loading goes on beside them


@dataclass(frozen=True, slots=True)
class Cluster:
    """What the run is to have, and what is known of it."""

    images: int  # trained on
    a_node: int  # ranks
    device: str
    batch_per_rank: int | None  # None: the recipe's batch, whatever the number of ranks
    rates: Rates


@dataclass(frozen=True, slots=True)
class Estimate:
    share: Share
    nodes: int
    steps_per_epoch: int
    steps: int
    candidates: int
    encoder_flops: float  # of a rank, a step
    loss_flops: float
    sent: dict[str, float]  # bytes of a rank, a step, by kind; as many are received
    calls: int  # collectives a step
    held: dict[str, int]  # bytes of a rank
    seconds: dict[str, float | None]  # of a step, by part; None where a rate is missing

    @property
    def step(self) -> float | None:
        """Seconds of a step."""
        parts = [self.seconds[name] for name in PARTS]
        if any(part is None for part in parts):
            return None
        return max(sum(part for part in parts if part is not None), self.seconds["loading"] or 0.0)

    @property
    def hours(self) -> float | None:
        return None if self.step is None else self.steps * self.step / 3600

    def part(self, name: str) -> float | None:
        """A part's share of the step."""
        seconds, step = self.seconds[name], self.step
        return None if seconds is None or step is None else seconds / step

    def to_json(self) -> dict[str, Any]:
        return {
            "ranks": self.share.ranks,
            "nodes": self.nodes,
            "images_per_rank": self.share.images,
            "batch_size": self.share.batch,
            "steps_per_epoch": self.steps_per_epoch,
            "steps": self.steps,
            "candidates": self.candidates,
            "encoder_flops": self.encoder_flops,
            "loss_flops": self.loss_flops,
            "bytes_sent": self.sent,
            "collectives": self.calls,
            "bytes_held": self.held,
            "seconds": self.seconds,
            "hours": self.hours,
        }


def estimate(recipe: Recipe, model: Model, cluster: Cluster, ranks: int) -> Estimate:
    """At ``ranks`` ranks, which divide the batch."""
    batch = cluster.batch_per_rank * ranks if cluster.batch_per_rank else recipe.batch_size
    precision = recipe.engine.precision
    half = precision == "bfloat16" or (precision == "auto" and cluster.device == "cuda")
    share = Share(ranks, batch // ranks, cluster.device, half)
    loss = loss_cost(share, model)
    transfers = loss.transfers + engine_transfers(share, model, recipe) + monitor_transfers(share, model, recipe)
    steps = count_steps(cluster.images, batch, recipe.data.last)
    forwards, backwards = passes(model, recipe.engine.accumulation)
    again = model.forward_flops if forwards > backwards else 0.0
    seconds: dict[str, float | None] = {
        "encoder": _over(share.images, known(cluster.rates, "images_per_second")),
        "loss": _over(loss.flops, known(cluster.rates, "matmul_rate")),
        "network": _network(transfers, share, cluster),
        "loading": _over(share.images * min(ranks, cluster.a_node), known(cluster.rates, "loading")),
    }
    return Estimate(
        share=share,
        nodes=-(-ranks // cluster.a_node),
        steps_per_epoch=steps,
        steps=steps * recipe.epochs,
        candidates=loss.candidates,
        encoder_flops=share.images * (model.step_flops + again + model.target_flops),
        loss_flops=loss.flops,
        sent={kind: sum(t.sent(ranks) for t in transfers if t.kind == kind) for kind in KINDS},
        calls=sum(transfer.times for transfer in transfers),
        held=_weights_held(recipe, model, ranks) | loss.held,
        seconds=seconds,
    )


def _weights_held(recipe: Recipe, model: Model, ranks: int) -> dict[str, int]:
    states = 2 if recipe.optim.name in ("adam", "adamw") else 1
    shards = ranks if recipe.engine.zero_stage else 1
    weight = 4 * model.parameters
    held = {"weights, gradients, optimizer": 2 * weight + states * weight // shards}
    return held | ({"gradients once more, flat, to be sent": weight} if ranks > 1 else {})


def _network(transfers: Iterable[Transfer], share: Share, cluster: Cluster) -> float | None:
    """Seconds: of each transfer over the slower of a rank's link and its node's, and a latency each."""
    if share.ranks == 1:
        return 0.0
    inside, between = known(cluster.rates, "network"), known(cluster.rates, "node_network")
    latency = known(cluster.rates, "latency") or 0.0
    total = 0.0
    for transfer in transfers:
        sent, outside = transfer.within(share.ranks, cluster.a_node)
        links = [(outside, between)] if cluster.a_node == 1 else [(sent, inside), (outside, between)]
        times = [_over(size, rate) for size, rate in links if size]
        if any(time is None for time in times):
            return None
        total += max((time for time in times if time is not None), default=0.0) + latency * transfer.times
    return total


def _over(amount: float, rate: float | None) -> float | None:
    return 0.0 if not amount else None if rate is None else amount / rate


def possible_ranks(recipe: Recipe, cluster: Cluster, up_to: int) -> list[int]:
    """1, 2, 4, … as far as a batch can be divided among them."""
    found = [1 << power for power in range(up_to.bit_length()) if 1 << power <= up_to]
    return [ranks for ranks in found if divides(recipe, cluster, ranks)]


def divides(recipe: Recipe, cluster: Cluster, ranks: int) -> bool:
    if cluster.batch_per_rank:
        return cluster.batch_per_rank % recipe.engine.accumulation == 0 and cluster.batch_per_rank * ranks <= 10**9
    return recipe.batch_size % (ranks * recipe.engine.accumulation) == 0


def first_at(estimates: Sequence[Estimate], part: str, least: float) -> int | None:
    """The smallest number of ranks from which on a part takes at least this share of a step."""
    first = None
    for one in reversed(estimates):
        if (one.part(part) or 0.0) < least:
            break
        first = one.share.ranks
    return first


def of_candidates(one: Estimate) -> float:
    """Bytes a step that a rank sends because it compares with the others' images, the queue's rows left out."""
    return sum(one.sent[kind] for kind in (EMBEDDINGS, GRADIENTS, LOG_SUMS, MATRICES))
