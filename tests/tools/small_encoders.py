"""Encoders to be exported, the command, and what a written file says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from tools import export
from trainers.dropout import add_dropout
from trainers.encoders import EncoderConfig, build_encoder

MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]


def lived_in(arch: str, stem: str, size: int, dropout: float = 0) -> nn.Module:
    """An encoder whose BatchNorm does something: statistics and affine parameters away from 0 and 1."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(arch=arch, stem=stem), size)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    if dropout:
        add_dropout(encoder, dropout)
    return encoder.eval()


def save(encoder: nn.Module, path: Path, arch: str, stem: str, size: int, **more: Any) -> Path:
    about = {"arch": arch, "stem": stem, "image_size": size, "mean": MEAN, "std": STD, **more}
    save_file(encoder.state_dict(), path, metadata={"twinstream": json.dumps(about)})
    return path


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(export.app, [str(argument) for argument in arguments])


def metadata_of(path: Path) -> dict[str, Any]:
    """Read by each library's own means."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["twinstream"])
    if path.suffix == ".onnx":
        return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["twinstream"])
    extra = {"twinstream": ""}
    if path.suffix == ".pt2":
        torch.export.load(path, extra_files=extra)
    else:
        torch.jit.load(path, _extra_files=extra)
    return json.loads(extra["twinstream"])
