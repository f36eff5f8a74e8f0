"""What a run is made of: every trick is a field with a default, and can be turned off alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides a run, but for the data and the seed. Shares are of the run's steps."""

    arch: str = "resnet18"
    epochs: int = 40
    batch: int = 512  # images a step, two views of each; the last, smaller batch is left out
    hidden: int = 512  # of the projector, which has one hidden layer with BatchNorm
    output: int = 128
    loss: str = "decoupled"  # decoupled: Yeh et al., arXiv:2110.06848; ntxent: SimCLR's
    temperature: float = 0.2
    optimizer: str = "sgd"  # sgd: with Nesterov's momentum; lars
    lr: float = 0.06  # for a batch of 256, in proportion to it otherwise
    weight_decay: float = 5e-4  # never on biases and norms
    momentum: float = 0.9
    schedule: str = "cosine"  # after a linear warm-up; or constant
    warmup: float = 0.1  # share
    sizes: tuple[tuple[float, int], ...] = ((0.0, 24), (0.6, 32))  # from which share on the views have which side
    crop: float = 0.2  # least share of the image's area
    colours: float = 0.5  # strength of the jitter, SimCLR's s
    grey: float = 0.1  # probability
    flip: float = 0.5  # probability
    average: float = 0.02  # horizon of the weights' moving average, a share; 0: none
    half: bool = True  # bfloat16 autocast, on a GPU
    channels_last: bool = True
    fused_loss: bool = True  # our kernels; else the matrix of logits
    compile: bool = True  # on a GPU
    graph: bool = True  # the whole step in one CUDA graph, on a GPU

    def __post_init__(self) -> None:
        allowed = {
            "arch": ("resnet18", "resnet8x4"),
            "loss": ("decoupled", "ntxent"),
            "optimizer": ("sgd", "lars"),
            "schedule": ("cosine", "constant"),
        }
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        for name in ("epochs", "batch", "hidden", "output"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("temperature", "lr", "crop"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number above 0")
        for name in ("warmup", "grey", "flip", "average", "momentum", "crop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share from 0 to 1")
        starts = [start for start, _ in self.sizes]
        if not starts or starts[0] != 0 or starts != sorted(starts) or min(side for _, side in self.sizes) < 4:
            raise ValueError(f"sizes is {self.sizes}, expected (share, side) from share 0 up, sides from 4 pixels")

    def size_at(self, progress: float) -> int:
        """The side of the views in pixels, `progress` (0 to 1) of the way through."""
        return [side for start, side in self.sizes if start <= progress][-1]

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` of `steps`: linear up to the peak, then half a cosine down to 0."""
        peak = self.lr * self.batch / 256
        warmup = round(self.warmup * steps)
        if step < warmup:
            return peak * (step + 1) / warmup
        if self.schedule == "constant":
            return peak
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    def changed(self, assignments: dict[str, str]) -> Recipe:
        """With fields set from text, such as {"lr": "0.1", "sizes": "0:24,0.6:32"}.

        Raises:
            ValueError: no such field, or a value that is not of its kind.
        """
        types = {field.name: field.type for field in fields(self)}
        found: dict[str, Any] = {}
        for name, text in assignments.items():
            if name not in types:
                raise ValueError(f"a recipe has no {name!r}; there are {', '.join(types)}")
            try:
                found[name] = _read(str(types[name]), text)
            except ValueError:
                raise ValueError(
                    f"{name}={text}: expected {_EXPECTED.get(str(types[name]), 'pairs like 0:24,0.6:32')}"
                ) from None
        return replace(self, **found)


_EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a word"}


def _read(kind: str, text: str) -> Any:
    if kind == "bool":
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if kind in ("int", "float", "str"):
        return {"int": int, "float": float, "str": str}[kind](text)
    pairs = [part.split(":") for part in text.split(",")]
    return tuple((float(start), int(side)) for start, side in pairs)


# The short run is for linear 0.83, the long one for kNN 90 % and linear 0.90.
GPU: MappingProxyType[str, Recipe] = MappingProxyType(
    {"short": Recipe(), "long": Recipe(epochs=200, average=0.01, warmup=0.05)}
)
CPU = Recipe(
    arch="resnet8x4", epochs=6, batch=64, hidden=256, sizes=((0.0, 16), (0.5, 24)), lr=0.12, average=0.0,
    channels_last=False,
)  # fmt: skip
DIGITS = replace(CPU, epochs=12, sizes=((0.0, 8), (0.5, 12)), flip=0.0, grey=0.0, crop=0.4, colours=0.5)

# Each trick turned off, or exchanged for what one would do otherwise.
ABLATIONS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "no graph": {"graph": False},
        "no compile": {"compile": False},
        "float32": {"half": False},
        "channels first": {"channels_last": False},
        "loss with a matrix": {"fused_loss": False},
        "NT-Xent": {"loss": "ntxent"},
        "temperature 0.5": {"temperature": 0.5},
        "LARS": {"optimizer": "lars", "lr": 0.3, "weight_decay": 1e-6},
        "constant lr": {"schedule": "constant"},
        "one size": {"sizes": ((0.0, 32),)},
        "crops from 0.08": {"crop": 0.08},
        "grey 0.2": {"grey": 0.2},
        "no average": {"average": 0.0},
        "batch 256": {"batch": 256},
        "batch 2048": {"batch": 2048},
    }
)
