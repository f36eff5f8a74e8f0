"""The methods, one file each.

A method file defines ``Config`` (a ``MethodConfig`` with a literal ``name``) and ``Method`` (an ``nn.Module``). To add
one, add the file and a recipe: the registry below finds it.

``Method(config, encoder, facts)`` has

* ``encoder``, the ``nn.Module`` that is kept after pretraining;
* ``embed(views[V, N, 3, H, W]) -> dict`` of tensors [V, N, …], among them ``features``; its ``forward`` is the same
  function, which is what the engine wraps;
* ``targets(batch) -> dict`` of tensors [v, N, …], what the loss needs of the images without a gradient: hand-crafted
  features, a teacher's output. Nothing, for most methods;
* ``loss(embeddings, batch, group) -> dict`` with ``loss`` (the mean over all ranks of ``group``, its gradient
  already multiplied by their number, so that averaging gradients over ranks is exact) and detached scalars to log;
  ``embeddings`` holds what ``embed`` and ``targets`` gave;
* ``update(embeddings, batch, group)``, once per optimizer step: the only place where buffers change. Whatever
  persists between steps is a registered buffer, the same on every rank.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.config import Section
from pipelines.views import View


@dataclass(frozen=True, slots=True)
class Facts:
    """What a method may know of the run that it is a part of."""

    image_size: int  # side of a view, pixels
    mean: tuple[float, float, float]  # that views were normalised with
    std: tuple[float, float, float]
    images: int  # trained on
    classes: int  # 0: none are known
    multi_label: bool  # whether an image may have several
    seed: int  # of the run, for draws of a method's own
    batch_size: int  # images a step, of all ranks and micro-batches
    steps_per_epoch: int
    total_steps: int
    plan: tuple[View, ...]  # the views of an image
    steady: bool  # whether a view that is not augmented has the same pixels whenever it is made


class MethodConfig(Section):
    name: str
    least_batch: ClassVar[int] = 2  # images: the loss tells each from the others

    @property
    def embeds_pairs(self) -> bool:
        """Whether ``embed`` gives features of two views of an image at least."""
        return True

    def check_views(self, plan: tuple[View, ...]) -> None:
        """Refuse a plan that does not have the views that the method takes; raise ValueError."""
        if len(plan) != 2:
            raise ValueError(f"the views section makes {len(plan)} views of an image, method.name={self.name} takes 2")

    def check(self, *, images: int, batch_size: int, image_size: int) -> None:
        """Refuse settings that cannot work with so many training images, and views of ``image_size`` pixels; raise
        ValueError naming the key."""
        if batch_size < self.least_batch:
            raise ValueError(
                f"batch_size={batch_size} is too small for method.name={self.name}, whose loss compares the images of a"
                f" batch with each other; at least {self.least_batch}"
            )


class BaseMethod(nn.Module, ABC):
    """What every method shares: ``forward`` is ``embed``, and by default nothing is updated."""

    encoder: nn.Module
    view_parts: int = 1  # in how many equal parts the views are embedded, one part's activations in memory at a time
    separable: bool = False  # whether the loss of all views is the mean of the losses of the parts

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        return self.embed(views)

    @abstractmethod
    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [V, N, 3, H, W] -> tensors [V, N, …], among them ``features``. With ``view_parts`` P: V/P of them."""

    def targets(self, batch: ViewBatch) -> dict[str, Tensor]:
        """What the loss needs of a micro-batch's images and no gradient flows to, [v, N, …]; called under no_grad."""
        return {}

    @abstractmethod
    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """``loss``, and detached scalars to log. With several micro-batches ``batch.views`` is empty."""

    def update(self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None) -> None:
        """Change buffers (queue, prototypes, counts) after an optimizer step; ``embeddings`` are detached."""


def method_names() -> list[str]:
    """The methods there are, from the files of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_method(name: str) -> ModuleType:
    """The module of a method: its ``Config`` and its ``Method``."""
    return importlib.import_module(f"{__name__}.{name}")


def build_method(config: MethodConfig, encoder: nn.Module, facts: Facts) -> BaseMethod:
    method: BaseMethod = find_method(config.name).Method(config, encoder, facts)
    return method
