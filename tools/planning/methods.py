"""What each method's loss sends, computes and holds on one rank, a step: the formulas, one function a method.

Operations are those of matrix products with candidates, twice the multiply-adds; what costs a rank the same whatever
the number of ranks is left out. Of BeCLR's phases the dearer, of queues and centres the state in which they are full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import comb

from tools.planning.model import Model
from tools.planning.transfers import (
    EMBEDDINGS,
    EXCHANGE,
    GATHER,
    GRADIENTS,
    LOG_SUMS,
    MATRICES,
    QUEUE,
    REDUCE,
    SCALARS,
    SCATTER,
    WEIGHTS,
    Share,
    Transfer,
)

_SCALAR = Transfer(SCALARS, REDUCE, 4)


@dataclass(slots=True)
class LossCost:
    """Of one rank and step, plus what stays in memory."""

    candidates: int = 0  # rows that an anchor is compared with
    flops: float = 0.0
    transfers: list[Transfer] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)  # bytes that grow with batch, ranks or queue, at their most

    def __iadd__(self, other: LossCost) -> LossCost:
        self.candidates = max(self.candidates, other.candidates)
        self.flops += other.flops
        self.transfers += other.transfers
        for name, size in other.held.items():
            self.held[name] = self.held.get(name, 0) + size
        return self


def loss_cost(share: Share, model: Model) -> LossCost:
    """What the loss and the update of the recipe's method cost; of a single rank nothing is sent."""
    found = _METHODS[model.config.name](share, model)
    if share.ranks == 1:
        found.transfers = []
    return found


# ---- losses ---------------------------------------------------------------------------------------------


def _shapes(share: Share) -> Transfer:
    """`kernels.ranks.check_same_on_ranks`."""
    return Transfer(SCALARS, GATHER, 3 * 8 * share.ranks)


def _similarities(width: int) -> Transfer:
    return Transfer(SCALARS, REDUCE, 4 * (width + 2))


def _ntxent(share: Share, width: int) -> LossCost:
    """`kernels.ntxent`: every rank finds the gradient of its own rows, from all rows and their log-sum-exps."""
    rows, candidates = 2 * share.images, 2 * share.batch
    unit = _ntxent_bytes(share, width)
    return LossCost(
        candidates=candidates - 1,
        flops=3 * 2.0 * rows * candidates * width,
        transfers=[
            _shapes(share),
            Transfer(EMBEDDINGS, GATHER, candidates * unit),
            Transfer(LOG_SUMS, GATHER, 4 * candidates),
            _SCALAR,
        ],
        held={"gathered candidates": candidates * unit},
    )


def _ntxent_bytes(share: Share, width: int) -> int:
    """Of a row as it is gathered. Triton's are padded halves, two of them for products as good as float32."""
    if share.device == "cpu":
        return max(4, share.element) * width
    parts, resident = (1, 256) if share.half else (2, 128)
    block = max(16, 1 << (width - 1).bit_length()) if width <= resident else resident // 2
    return 2 * parts * -(-width // block) * block


def _gathered_with_gradient(rows: int, width: int, kind: str = EMBEDDINGS) -> list[Transfer]:
    """`kernels.ranks.gather_rows_with_gradient` of float32, ``rows`` over all ranks."""
    return [Transfer(kind, GATHER, 4 * rows * width), Transfer(GRADIENTS, SCATTER, 4 * rows * width)]


def _neighbour_loss(share: Share, width: int) -> LossCost:
    """`trainers.parts.neighbours.neighbour_loss`: candidates are the predictions of one view."""
    return LossCost(
        candidates=share.batch,
        flops=2 * 4 * 2.0 * share.images * share.batch * width,
        transfers=[*_gathered_with_gradient(2 * share.batch, width), _SCALAR],
        held={"gathered candidates": 2 * 4 * 2 * share.batch * width, "their gradient": 4 * 2 * share.batch * width},
    )


def _dependence(share: Share, fixed: int | None, trained: tuple[int, ...], estimator: str) -> LossCost:
    """A distance correlation of two sides; ``fixed``: the width of one that needs no gradient."""
    cost = LossCost()
    sides = [(fixed, False)] if fixed is not None else []
    for width, learns in [*sides, *((width, True) for width in trained)]:
        if estimator == "floored":
            both = _gathered_with_gradient(share.batch, width)
            cost.transfers += both if learns else both[:1]
            cost.flops += (3 if learns else 1) * 2.0 * share.batch**2 * width
            cost.held["matrices of distances"] = cost.held.get("matrices of distances", 0) + 5 * 4 * share.batch**2
            continue
        own = -(-width // share.ranks)  # columns of all rows that this rank holds
        moved = 4 * share.images * own * share.ranks
        cost.transfers += [_shapes(share), Transfer(EMBEDDINGS, EXCHANGE, moved)]
        cost.transfers += [Transfer(MATRICES, REDUCE, 8 * share.batch**2)]
        if share.device == "cuda":
            cost.transfers += [_SCALAR, Transfer(MATRICES, REDUCE, 4 * share.batch**2)]
        if learns:
            cost.transfers.append(Transfer(GRADIENTS, EXCHANGE, moved))
        cost.flops += (2 if learns else 1) * 2.0 * share.batch**2 * own
        kept = (4 if share.device == "cuda" else 8) * share.batch**2  # until the backward pass
        cost.held["matrices of distances"] = cost.held.get("matrices of distances", 0) + kept
    cost.candidates = share.batch - 1
    return cost


def _view_terms(share: Share, width: int, estimator: str) -> LossCost:
    """`trainers.parts.view_terms.view_terms`."""
    cost = _dependence(share, None, (width, width), estimator)
    cost.transfers += [Transfer(SCALARS, REDUCE, 4 * 2 * width, 2), _SCALAR]
    return cost


# ---- methods --------------------------------------------------------------------------------------------


def _simclr(share: Share, model: Model) -> LossCost:
    width = model.widths["z"]
    if model.config.similarity == "cosine":
        cost = _ntxent(share, width)
    else:
        rows = 2 * share.batch
        per_view = _gathered_with_gradient(share.batch, width)
        cost = LossCost(
            candidates=rows - 1,
            flops=4 * 2.0 * 2 * share.images * rows * width,
            transfers=[_shapes(share), *per_view, *per_view, _SCALAR],
            held={"gathered candidates": 2 * 4 * rows * width, "their gradient": 4 * rows * width},
        )
    cost.transfers += [_similarities(width), _SCALAR]
    return cost


def _avgsimclr(share: Share, model: Model) -> LossCost:
    width, pairs = model.widths["z"], model.views // 2
    cost = LossCost(transfers=[_similarities(width)] * pairs)
    if model.config.pairing == "shared":
        rows = model.views * share.batch
        cost += LossCost(
            candidates=rows - 1,
            flops=4 * 2.0 * model.views * share.images * rows * width,
            transfers=[_shapes(share), *_gathered_with_gradient(rows, width), _SCALAR],
            held={"gathered candidates": 4 * rows * width, "their gradient": 4 * rows * width},
        )
        return cost
    for _ in range(pairs if model.config.pairing == "pairs" else comb(model.views, 2)):
        cost += _ntxent(share, width)
    if model.config.pairing == "pairs":  # one pair after the other
        cost.held = _ntxent(share, width).held
    return cost


def _beclr(share: Share, model: Model) -> LossCost:
    config, width, k = model.config.settled(), model.widths["z"], model.widths["scores"]
    rows, soft = 2 * share.batch, config.soft_share > 0
    cost = LossCost(transfers=[_similarities(width), Transfer(SCALARS, REDUCE, 4 * k), _SCALAR, _SCALAR])
    if config.loss == "margin":
        choices = _gathered_with_gradient(rows, k)
        cost.transfers += [*(choices if soft else choices[:1]), _SCALAR]
        cost.held["gathered candidates"] = 4 * rows * k
    elif soft:
        padded = _bregman_width(share, k + 1)
        table = 4 * rows * padded
        cost.transfers += [_shapes(share), Transfer(EMBEDDINGS, GATHER, table, 2)]
        cost.transfers += [Transfer(LOG_SUMS, GATHER, 2 * 4 * rows), _SCALAR]
        cost.flops += 5 * 2.0 * 2 * share.images * rows * padded
        cost.held["gathered candidates"] = 2 * table
    else:
        cost.transfers += [_shapes(share), Transfer(SCALARS, REDUCE, 8 * k), _SCALAR]
    if config.usage_weight:
        cost.transfers += _gathered_with_gradient(share.ranks, k, SCALARS)
    if config.ntxent_weight:
        cost += _ntxent(share, width)
        cost.transfers.append(_SCALAR)
    cost.candidates = rows - 1
    return cost


def _bregman_width(share: Share, columns: int) -> int:
    if share.device == "cpu":
        return columns
    block = min(max(32, 1 << (columns - 1).bit_length()), 128)
    return -(-columns // block) * block


def _nnclr(share: Share, model: Model) -> LossCost:
    config, width = model.config, model.widths["z"]
    new = share.batch * {"first": 1, "both": 2}[config.enqueue]
    cost = _neighbour_loss(share, width)
    cost.flops += 2.0 * 2 * share.images * config.queue_size * width
    cost.transfers += [
        _similarities(width),
        Transfer(SCALARS, REDUCE, 4 * 2 * 4),
        _shapes(share),
        Transfer(QUEUE, GATHER, 2 * new * width),
        Transfer(QUEUE, GATHER, 2 * 8 * new),
    ]
    cost.held["queue"] = config.queue_size * (2 * width + 3 * 8)
    return cost


def _kmclr(share: Share, model: Model) -> LossCost:
    width, k = model.widths["z"], model.config.centres
    cost = _neighbour_loss(share, width)
    cost.flops += 2.0 * 3 * share.images * k * width
    cost.transfers += [
        _similarities(width),
        Transfer(SCALARS, REDUCE, 4 * k),
        Transfer(SCALARS, REDUCE, 4 * 2 * 3),
        Transfer(QUEUE, REDUCE, share.element * k * width),
        Transfer(QUEUE, REDUCE, 8 * k),
        Transfer(QUEUE, GATHER, 2 * 8 * share.batch),
        Transfer(QUEUE, GATHER, share.element * share.batch * width),
    ]
    cost.held["centres and last rows"] = 2 * 4 * k * width
    return cost


def _probsimclr(share: Share, model: Model) -> LossCost:
    width = model.widths["z"]
    if model.config.loss == "ntxent":
        cost = _ntxent(share, width)
        cost.transfers += [_similarities(width), _SCALAR]
        return cost
    table = 4 * share.batch * width
    return LossCost(
        candidates=share.batch,
        flops=5 * 2.0 * share.images * share.batch * width,
        transfers=[
            _shapes(share),
            Transfer(EMBEDDINGS, GATHER, table, 2),
            Transfer(LOG_SUMS, EXCHANGE, 4 * share.batch),
            Transfer(LOG_SUMS, GATHER, 2 * 4 * share.batch),
            _SCALAR,
            Transfer(SCALARS, REDUCE, 4 * (width + 4)),
            _similarities(width),
        ],
        held={"gathered candidates": 2 * table},
    )


def _mvmr(share: Share, model: Model) -> LossCost:
    width, estimator = model.widths["z"], _estimator(model)
    cost = _view_terms(share, width, estimator)
    for name in model.config.representations.wanted():
        cost += _dependence(share, model.widths[name], (width,), estimator)
    return cost


def _clipdistill(share: Share, model: Model) -> LossCost:
    config, teacher, estimator = model.config, model.widths["teacher"], _estimator(model)
    if config.mode == "self":
        width = model.widths["z"]
        cost = _view_terms(share, width, estimator)
        cost += _dependence(share, teacher, (width,), estimator)
        return cost
    cost = _dependence(share, teacher, (model.features,), estimator)
    hidden, classes = config.supervised.head_hidden, model.widths["logits"]
    head = (teacher * hidden, hidden, hidden * classes, classes)
    cost.transfers += [_SCALAR] * 5 + [Transfer(WEIGHTS, REDUCE, 4 * size) for size in head]
    return cost


def _estimator(model: Model) -> str:
    return "floored" if model.config.faithful else model.config.estimator or "unbiased"


_METHODS: dict[str, Callable[[Share, Model], LossCost]] = {
    "avgsimclr": _avgsimclr,
    "beclr": _beclr,
    "clipdistill": _clipdistill,
    "kmclr": _kmclr,
    "mvmr": _mvmr,
    "nnclr": _nnclr,
    "probsimclr": _probsimclr,
    "simclr": _simclr,
}
