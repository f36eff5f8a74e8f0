"""What has to be known of a recipe's network: its parameters, widths and operations, from the network itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from configs.recipe import Recipe
from pipelines.batch import ViewBatch
from trainers.encoders import build_encoder, feature_width
from trainers.methods import BaseMethod, Facts, MethodConfig, build_method


@dataclass(frozen=True, slots=True)
class Model:
    config: Any  # the method's config
    views: int  # of an image
    parts: int  # in which they are embedded
    separable: bool  # whether the loss is the mean of the parts'
    parameters: int  # that are trained
    groups: tuple[int, ...]  # the parameters by groups of the optimizer: with weight decay, and without
    buffers: int  # bytes
    norms: tuple[int, ...]  # channels of each BatchNorm
    features: int  # width
    widths: dict[str, int]  # of what `embed` and `targets` give, by name
    classes: int  # for the online probe; 0: there is none
    forward_flops: float  # of encoder and heads, an image with all its views
    step_flops: float  # forward and backward
    target_flops: float  # of a teacher that is asked in every step


def model_of(recipe: Recipe, *, images: int, classes: int, size: int) -> Model:
    """Build the recipe's network and look at it.

    Raises:
        DataError: a teacher is not at hand.
    """
    facts = facts_of(recipe, images=images, classes=classes, size=size)
    return look_at(build_method(recipe.method, build_encoder(recipe.encoder, size), facts), recipe.method, facts)


def facts_of(recipe: Recipe, *, images: int, classes: int, size: int) -> Facts:
    """What ``train.py`` would tell the method of such a set, as far as it matters here."""
    steps = max(1, images // recipe.batch_size)
    return Facts(
        image_size=size,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        images=images,
        classes=classes,
        multi_label=False,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        steps_per_epoch=steps,
        total_steps=recipe.epochs * steps,
        plan=recipe.views.resolve(),
        steady=not recipe.data.scaled,
    )


def look_at(method: BaseMethod, config: MethodConfig, facts: Facts) -> Model:
    """Take stock of a method, without training it."""
    method.train()
    trained = [p for p in method.parameters() if p.requires_grad]
    matrices = sum(p.numel() for p in trained if p.dim() > 1)
    parameters = sum(p.numel() for p in trained)
    targets, target_flops = _targets(method, facts)
    outputs, forward, step = _embed(method, len(facts.plan), facts.image_size)
    return Model(
        config=config,
        views=len(facts.plan),
        parts=method.view_parts,
        separable=method.separable,
        parameters=parameters,
        groups=tuple(count for count in (matrices, parameters - matrices) if count),
        buffers=sum(b.numel() * b.element_size() for b in method.buffers()),
        norms=tuple(m.num_features for m in method.modules() if isinstance(m, _BatchNorm) and m.training),
        features=feature_width(method.encoder),
        widths=targets | outputs,
        classes=facts.classes,
        forward_flops=forward * method.view_parts,
        step_flops=step * method.view_parts,
        target_flops=0.0 if _remembers(method) else target_flops,
    )


def _targets(method: BaseMethod, facts: Facts) -> tuple[dict[str, int], float]:
    """Widths of what a loss needs without a gradient, and what it costs an image (matrix products only)."""
    dtype = next(method.parameters()).dtype
    size = facts.image_size
    batch = ViewBatch(torch.zeros(len(facts.plan), 1, 3, size, size, dtype=dtype), torch.zeros(1), torch.tensor([0]))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        found = method.targets(batch)
    return {name: rows.shape[-1] for name, rows in found.items()}, float(counter.get_total_flops())


def _embed(method: BaseMethod, views: int, size: int, images: int = 2) -> tuple[dict[str, int], float, float]:
    """Widths of the embeddings, and the operations of one part's forward pass and of both passes, an image."""
    dtype = next(method.parameters()).dtype
    with FakeTensorMode() as fake, FlopCounterMode(display=False) as counter:  # shapes, no numbers
        state = {**dict(method.named_parameters()), **dict(method.named_buffers())}
        pretended: dict[str, Tensor] = {name: fake.from_tensor(tensor) for name, tensor in state.items()}
        example = torch.empty(views // method.view_parts, images, 3, size, size, dtype=dtype)
        found = functional_call(method, pretended, (example,))
        forward = counter.get_total_flops()
        sum(rows.sum() for rows in found.values()).backward()
    widths = {name: rows.shape[-1] for name, rows in found.items()}
    return widths, forward / images, counter.get_total_flops() / images


def _remembers(method: BaseMethod) -> bool:
    remembered = getattr(method, "remembered", None)
    return remembered is not None and remembered.enabled
