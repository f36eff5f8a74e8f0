"""One optimizer step: the parts of a method, composed in one pass or in two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.batch import ViewBatch
from trainers.batchnorm import frozen_running_statistics
from trainers.dropout import dropout_rate
from trainers.engine import Engine, EngineConfig
from trainers.methods import BaseMethod

Embeddings = dict[str, Tensor]


@dataclass(slots=True)
class StepResult:
    scalars: dict[str, Tensor]  # what the method's loss returned, detached, on the device
    embeddings: Embeddings  # [V, N, …] of the rank's whole batch, detached
    batch: ViewBatch  # the rank's whole batch; with several micro-batches its views are left out


def train_step(engine: Engine, method: BaseMethod, micro_batches: Sequence[ViewBatch], lr: float) -> StepResult:
    """Update the weights once by the loss of all micro-batches together.

    Contrastive losses couple the samples of a batch, so accumulating per-micro-batch losses would silently shrink
    it. With several micro-batches there are therefore two passes (Gao et al., arXiv:2101.06983): embed all without a
    graph; loss and gradient on the embeddings; then embed each again and pull that gradient through. A method that
    embeds its views in parts goes the same way, or part by part if its loss is the mean of the parts' losses.
    """
    result = optimise(engine, method, micro_batches, lr)
    update_method(engine, method, result)
    return result


def optimise(engine: Engine, method: BaseMethod, micro_batches: Sequence[ViewBatch], lr: float) -> StepResult:
    """``train_step`` without the method's own ``update``."""
    if len(micro_batches) > 1 or (method.view_parts > 1 and not method.separable):
        return _two_passes(engine, method, micro_batches, lr)
    return _part_by_part(engine, method, micro_batches[0], lr)


@torch.no_grad()
def update_method(engine: Engine, method: BaseMethod, result: StepResult) -> None:
    """Let the method take in a step: queues, prototypes, counts."""
    method.update(result.embeddings, result.batch, engine.ranks.group)


def compile_embedding(method: BaseMethod, config: EngineConfig) -> None:
    """``torch.compile`` what the method embeds with: encoder and heads in one graph, for the shapes of the run alone.

    Modules stay as they are, and so do the names in checkpoints and exports; evaluation runs the encoder as it is.

    Raises:
        ValueError: the step embeds twice (``engine.accumulation``, views in parts) and has dropout, whose masks a
            compiled graph without gradient need not draw as one with gradient does.
    """
    twice = config.accumulation > 1 or (method.view_parts > 1 and not method.separable)
    if twice and dropout_rate(method) > 0:
        raise ValueError(
            "engine.compile does not go with dropout where a step embeds its images twice; set engine.accumulation=1"
            " or the method's dropout to 0, or leave engine.compile out"
        )
    method.embed = torch.compile(method.embed, dynamic=False)  # type: ignore[method-assign]


def _part_by_part(engine: Engine, method: BaseMethod, batch: ViewBatch, lr: float) -> StepResult:
    targets = _targets(method, batch)
    if method.view_parts == 1:  # the usual way, without operations that would change nothing
        embeddings = engine.forward(batch.views)
        scalars = method.loss(embeddings | targets, batch, engine.ranks.group)
        engine.backward(scalars["loss"])
        engine.step(lr)
        return StepResult(_detached(scalars), _detached(embeddings) | targets, batch)
    losses: list[Embeddings] = []
    parts: list[Embeddings] = []
    for views in batch.views.chunk(method.view_parts):
        embeddings = engine.forward(views)
        scalars = method.loss(embeddings | targets, batch, engine.ranks.group)
        engine.backward(scalars["loss"] / method.view_parts)
        engine.step(lr)
        losses.append(_detached(scalars))
        parts.append(_detached(embeddings))
    scalars = {name: torch.stack([part[name] for part in losses]).mean(0) for name in losses[0]}
    return StepResult(scalars, _joined(parts, dim=0) | targets, batch)


def _two_passes(engine: Engine, method: BaseMethod, micro_batches: Sequence[ViewBatch], lr: float) -> StepResult:
    device = engine.ranks.device
    states: list[tuple[Tensor, Tensor | None]] = []
    embedded: list[Embeddings] = []
    with torch.no_grad(), frozen_running_statistics(method):
        for micro in micro_batches:
            parts: list[Embeddings] = []
            for views in micro.views.chunk(method.view_parts):
                states.append(_generator_states(device))
                parts.append(engine.forward(views))
            embedded.append(_joined(parts, dim=0))
    embeddings = _joined(embedded, dim=1)
    targets = _joined([_targets(method, micro) for micro in micro_batches], dim=1)
    batch = micro_batches[0]
    if len(micro_batches) > 1:
        batch = ViewBatch(
            views=micro_batches[0].views[:, :0],
            labels=torch.cat([micro.labels for micro in micro_batches]),
            indices=torch.cat([micro.indices for micro in micro_batches]),
            host_indices=torch.cat([micro.indices_on_host() for micro in micro_batches]),
        )
    leaves = {name: value.detach().requires_grad_() for name, value in embeddings.items()}
    scalars = method.loss(leaves | targets, batch, engine.ranks.group)
    gradients = dict(
        zip(
            leaves,
            torch.autograd.grad(scalars["loss"], list(leaves.values()), allow_unused=True),
            strict=True,
        )
    )
    sizes = [len(micro.labels) for micro in micro_batches]
    pulled = {name: g.split(sizes, dim=1) for name, g in gradients.items() if g is not None}
    chunks = [(n, part, views) for n, micro in enumerate(micro_batches) for part, views in _parts(method, micro.views)]
    for (number, part, views), state in zip(chunks, states, strict=True):
        _restore_generators(device, state)  # the same dropout as in the first pass
        again = engine.forward(views)
        # DeepSpeed's stage 0 takes a scalar only; its derivative by the embeddings is the gradient wanted.
        products = [(again[name] * pulled[name][number].chunk(method.view_parts)[part]).sum() for name in pulled]
        engine.backward(torch.stack(products).sum())
        engine.step(lr)
    return StepResult(_detached(scalars), _detached(embeddings) | targets, batch)


def _parts(method: BaseMethod, views: Tensor) -> Iterable[tuple[int, Tensor]]:
    return enumerate(views.chunk(method.view_parts))


@torch.no_grad()
def _targets(method: BaseMethod, batch: ViewBatch) -> Embeddings:
    return _detached(method.targets(batch))


def _joined(parts: Sequence[Embeddings], dim: int) -> Embeddings:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts], dim=dim) for name in parts[0]}


def _detached(tensors: Embeddings) -> Embeddings:
    return {name: value.detach() for name, value in tensors.items()}


def _generator_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_generators(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
