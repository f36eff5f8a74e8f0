"""What is exported, and what a format has to bring."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trainers.dropout import dropout_rate
from trainers.encoders import feature_width
from trainers.features import FrozenEncoder, load_encoder


class ExportError(RuntimeError):
    """An encoder that a format cannot hold, or a file that did not pass its check."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One encoder, in eval mode on the CPU, on its way into one file."""

    module: nn.Module  # [N, 3, size, size] normalised -> [N, d]
    about: dict[str, Any]  # what every file says of its encoder
    output: Path
    normalisation: bool = False  # whether (x - mean) / std is to be part of the network

    @property
    def arch(self) -> str:
        return cast(str, self.about["arch"])

    @property
    def small(self) -> bool:
        """Whether the stem is one 3x3 convolution without max-pool, which no library's own model has."""
        return bool(self.about["stem"] == "small")

    @property
    def size(self) -> int:
        return cast(int, self.about["image_size"])

    def network(self) -> nn.Module:
        """What a graph is made of: the encoder, with its normalisation where that was asked for."""
        if not self.normalisation:
            return self.module
        return Normalised(self.module, self.about["mean"], self.about["std"]).eval()

    def metadata(self, load: str) -> str:
        """The JSON under "twinstream"; ``load`` is a line of Python."""
        return json.dumps({**self.about, "normalisation_inside": self.normalisation, "load": load})


class Format(Protocol):
    """A file of this package. Modules are formats; each has these names."""

    SUFFIX: str  # of its files
    LIBRARIES: tuple[str, ...]  # beyond Twinstream's own; all in the extra "export"
    NORMALISATION: bool  # whether it can be part of the file

    def refusal(self, arch: str, small: bool) -> str | None:
        """Why an encoder cannot be written, in one line."""

    def beside(self, arch: str) -> tuple[str, ...]:
        """The endings of the files written beside the first, such as ``-voc.yaml``."""

    def write(self, job: Job, path: Path) -> None:
        """Write to ``path``, a draft that is to become ``job.output``."""

    def read(self, job: Job, path: Path) -> Callable[[Tensor], Tensor]:
        """Load what was written, as its users will; gives [N, 3, size, size] -> [N, d]. Raises ExportError."""

    def checked_by(self) -> str:
        """What ``read`` ran the encoder with, and its version."""

    def how_to_load(self, job: Job, path: str) -> str:
        """One line of Python."""


class Normalised(nn.Module):
    """An encoder of images in [0, 1]: (x - mean) / std comes first."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, d]."""
        return cast(Tensor, self.encoder((images - self.mean) / self.std))


def load_and_describe(target: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder of a run or of weights, in eval mode, and what an exported file says of it.

    Raises:
        CheckpointError: see ``load_encoder``.
    """
    encoder = load_encoder(target)
    assert encoder.module is not None
    assert encoder.config is not None
    module = encoder.module.cpu().eval().requires_grad_(False)
    run, step = _origin(target, encoder)
    about = {
        "arch": encoder.config.arch,
        "stem": "small" if isinstance(module.maxpool, nn.Identity) else "imagenet",
        "image_size": encoder.image_size,
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "dropout": dropout_rate(module),  # off in every exported file
        "features": feature_width(module),
        "run": run,
        "step": step,
        "weights": encoder.identity,
    }
    return module, about


def _origin(target: Path, encoder: FrozenEncoder) -> tuple[str | None, int | None]:
    """The name of the run and its step, as far as they are known."""
    if target.is_dir():
        return target.resolve().name, encoder.step
    with safe_open(target, "pt") as file:
        about = json.loads(file.metadata()["twinstream"])
    folder = target.resolve().parent
    run = about.get("run") or (folder.name if (folder / "recipe.yaml").exists() else None)
    return run, about.get("step")
