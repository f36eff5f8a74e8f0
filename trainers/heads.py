"""Heads on top of the encoder: the projector of every method, and the predictor of some."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from pipelines.config import Section


class ProjectorConfig(Section):
    """An MLP of ``layers`` linear layers: d -> hidden -> … -> output. A method with other defaults subclasses this."""

    layers: int = Field(2, ge=1)
    hidden: int | None = Field(None, ge=1)  # None: as wide as the features
    output: int = Field(128, ge=1)
    # After which linear layers: all, as in SimCLR's own code; hidden, all but the last; none.
    batchnorm: Literal["all", "hidden", "none"] = "all"
    bias: bool = True  # of linear layers that no BatchNorm follows; before one a bias would do nothing


class PredictorConfig(Section):
    """An MLP of two linear layers on projections, D -> hidden -> D, BatchNorm between them (arXiv:2104.14548)."""

    hidden: int = Field(4096, ge=1)


def build_projector(config: ProjectorConfig, features: int) -> nn.Sequential:
    """The projector g: [N, features] -> [N, output]."""
    hidden = config.hidden or features
    widths = [features] + [hidden] * (config.layers - 1) + [config.output]
    modules: list[nn.Module] = []
    for layer, (width_in, width_out) in enumerate(pairwise(widths)):
        last = layer == config.layers - 1
        normalised = config.batchnorm == "all" or (config.batchnorm == "hidden" and not last)
        modules.append(nn.Linear(width_in, width_out, bias=config.bias and not normalised))
        if normalised:
            modules.append(nn.BatchNorm1d(width_out))
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


def build_predictor(config: PredictorConfig, width: int) -> nn.Sequential:
    """The predictor q: [N, width] -> [N, width]."""
    return build_projector(ProjectorConfig(hidden=config.hidden, output=width, batchnorm="hidden"), width)


def embed_views(encoder: nn.Module, projector: nn.Module, views: Tensor) -> dict[str, Tensor]:
    """views [V, N, 3, H, W] -> features [V, N, d], z [V, N, D]; one forward, so BatchNorm sees all views together."""
    features = encoder(views.flatten(0, 1))
    rows = {"features": features, "z": projector(features)}
    return {name: value.unflatten(0, views.shape[:2]) for name, value in rows.items()}
