"""One optimizer step: the three parts of a method, composed in one pass or in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.batch import ViewBatch
from trainers.batchnorm import frozen_running_statistics
from trainers.engine import Engine
from trainers.methods import BaseMethod


@dataclass(slots=True)
class StepResult:
    scalars: dict[str, Tensor]  # what the method's loss returned, detached, on the device
    embeddings: dict[str, Tensor]  # [V, N, …] of the rank's whole batch, detached
    batch: ViewBatch  # the rank's whole batch; with several micro-batches its views are left out


def train_step(engine: Engine, method: BaseMethod, micro_batches: Sequence[ViewBatch], lr: float) -> StepResult:
    """Update the weights once by the loss of all micro-batches together.

    Contrastive losses couple the samples of a batch, so accumulating per-micro-batch losses would silently shrink
    it. With several micro-batches there are therefore two passes (Gao et al., arXiv:2101.06983): embed all without a
    graph; loss and gradient on the embeddings; then embed each again and pull that gradient through.
    """
    if len(micro_batches) == 1:
        result = _one_pass(engine, method, micro_batches[0], lr)
    else:
        result = _two_passes(engine, method, micro_batches, lr)
    method.update(result.embeddings, result.batch)
    return result


def _one_pass(engine: Engine, method: BaseMethod, batch: ViewBatch, lr: float) -> StepResult:
    embeddings = engine.forward(batch.views)
    scalars = method.loss(embeddings, batch, engine.ranks.group)
    engine.backward(scalars["loss"])
    engine.step(lr)
    return StepResult(_detached(scalars), _detached(embeddings), batch)


def _two_passes(engine: Engine, method: BaseMethod, micro_batches: Sequence[ViewBatch], lr: float) -> StepResult:
    device = engine.ranks.device
    states: list[tuple[Tensor, Tensor | None]] = []
    parts: list[dict[str, Tensor]] = []
    with torch.no_grad(), frozen_running_statistics(method):
        for micro in micro_batches:
            states.append(_generator_states(device))
            parts.append(engine.forward(micro.views))
    embeddings = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    sizes = [len(micro.labels) for micro in micro_batches]
    batch = ViewBatch(
        views=micro_batches[0].views[:, :0],
        labels=torch.cat([micro.labels for micro in micro_batches]),
        indices=torch.cat([micro.indices for micro in micro_batches]),
    )
    leaves = {name: value.detach().requires_grad_() for name, value in embeddings.items()}
    scalars = method.loss(leaves, batch, engine.ranks.group)
    gradients = dict(
        zip(
            leaves,
            torch.autograd.grad(scalars["loss"], list(leaves.values()), allow_unused=True),
            strict=True,
        )
    )
    pulled = {name: g.split(sizes, dim=1) for name, g in gradients.items() if g is not None}
    for number, micro in enumerate(micro_batches):
        _restore_generators(device, states[number])  # the same dropout as in the first pass
        again = engine.forward(micro.views)
        # DeepSpeed's stage 0 takes a scalar only; its derivative by the embeddings is the gradient wanted.
        engine.backward(torch.stack([(again[name] * pulled[name][number]).sum() for name in pulled]).sum())
        engine.step(lr)
    return StepResult(_detached(scalars), _detached(embeddings), batch)


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in tensors.items()}


def _generator_states(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_generators(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
