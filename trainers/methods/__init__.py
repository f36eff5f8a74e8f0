"""The methods, one file each.

A method file defines ``Config`` (a ``MethodConfig`` with a literal ``name``) and ``Method`` (an ``nn.Module``). To add
one, add the file and a recipe: the registry below finds it.

``Method(config, encoder)`` has

* ``encoder``, the ``nn.Module`` that is kept after pretraining;
* ``embed(views[V, N, 3, H, W]) -> dict`` of tensors [V, N, …], among them ``features``; its ``forward`` is the same
  function, which is what the engine wraps;
* ``loss(embeddings, batch, group) -> dict`` with ``loss`` (the mean over all ranks of ``group``, its gradient
  already multiplied by their number, so that averaging gradients over ranks is exact) and detached scalars to log;
* ``update(embeddings, batch)``, once per optimizer step: the only place where buffers change.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from types import ModuleType
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor, nn

from pipelines.batch import ViewBatch
from pipelines.config import Section


class MethodConfig(Section):
    views: ClassVar[int] = 2  # how many views of an image the method takes
    name: str

    def check(self, *, images: int, batch_size: int) -> None:
        """Refuse settings that cannot work with this many training images; raise ValueError naming the key."""
        queue = getattr(self, "queue_size", None)
        if queue is not None and queue > images:
            raise ValueError(
                f"method.queue_size={queue} is larger than the {images} training images: neighbours would be"
                f" older embeddings of the same image; at most {images}"
            )


class BaseMethod(nn.Module, ABC):
    """What every method shares: ``forward`` is ``embed``, and by default nothing is updated."""

    encoder: nn.Module

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        return self.embed(views)

    @abstractmethod
    def embed(self, views: Tensor) -> dict[str, Tensor]:
        """views [V, N, 3, H, W] -> tensors [V, N, …], among them ``features``."""

    @abstractmethod
    def loss(
        self, embeddings: dict[str, Tensor], batch: ViewBatch, group: dist.ProcessGroup | None
    ) -> dict[str, Tensor]:
        """``loss``, and detached scalars to log."""

    def update(self, embeddings: dict[str, Tensor], batch: ViewBatch) -> None:
        """Change buffers (queue, prototypes, counts) after an optimizer step."""


def method_names() -> list[str]:
    """The methods there are, from the files of this package."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find_method(name: str) -> ModuleType:
    """The module of a method: its ``Config`` and its ``Method``."""
    return importlib.import_module(f"{__name__}.{name}")


def build_method(config: MethodConfig, encoder: nn.Module) -> BaseMethod:
    method: BaseMethod = find_method(config.name).Method(config, encoder)
    return method
