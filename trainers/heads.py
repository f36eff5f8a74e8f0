"""Heads on top of the encoder: the projector of every method."""

from __future__ import annotations

from itertools import pairwise

from pydantic import Field
from torch import nn

from pipelines.config import Section


class ProjectorConfig(Section):
    """An MLP of ``layers`` linear layers: d -> hidden -> … -> output."""

    layers: int = Field(2, ge=1)
    hidden: int | None = Field(None, ge=1)  # None: as wide as the features
    output: int = Field(128, ge=1)
    batchnorm: bool = True  # after every linear layer, the last one included, as in SimCLR's own code


def build_projector(config: ProjectorConfig, features: int) -> nn.Sequential:
    """The projector g: [N, features] -> [N, output]. A linear layer has a bias only where no BatchNorm follows."""
    hidden = config.hidden or features
    widths = [features] + [hidden] * (config.layers - 1) + [config.output]
    modules: list[nn.Module] = []
    for layer, (width_in, width_out) in enumerate(pairwise(widths)):
        modules.append(nn.Linear(width_in, width_out, bias=not config.batchnorm))
        if config.batchnorm:
            modules.append(nn.BatchNorm1d(width_out))
        if layer < config.layers - 1:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)
