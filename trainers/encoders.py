"""ResNets without a classifier, with the stem that fits the image size.

Parameter names are torchvision's own (``conv1.weight``, ``layer1.0.conv1.weight``, …, no ``fc``), so exported
weights load wherever a torchvision ResNet does.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from pipelines.config import Section

SMALL_IMAGE = 64  # up to this many pixels a 7x7 stride-4 stem would leave almost no spatial extent

Architecture = Literal["resnet8x4", "resnet18", "resnet34", "resnet50", "resnet101"]


class EncoderConfig(Section):
    arch: Architecture = "resnet18"
    stem: Literal["auto", "small", "imagenet"] = "auto"  # auto: small up to 64 pixels


def feature_width(encoder: nn.Module) -> int:
    """How many features an encoder of ``build_encoder`` gives."""
    return cast(int, encoder.features)


def build_encoder(config: EncoderConfig, image_size: int) -> nn.Module:
    """The encoder f: [N, 3, H, W] -> [N, d], with its width d in ``.features``.

    ``small`` is the stem of the CIFAR literature: 3x3, stride 1, padding 1, no max-pool (arXiv:2002.05709, B.9).
    """
    small = config.stem == "small" or (config.stem == "auto" and image_size <= SMALL_IMAGE)
    if config.arch == "resnet8x4":
        return ResNet8x4(small)
    encoder = getattr(torchvision.models, config.arch)(weights=None)
    encoder.features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    if small:
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
        encoder.maxpool = nn.Identity()
    return encoder


class ResNet8x4(nn.Module):
    """Three stages of one basic block, widths 64/128/256 on a 32-channel stem: 1.2 M parameters, 256 features.

    The small network of the distillation literature (Contrastive Representation Distillation, arXiv:1910.10699),
    quick enough to pretrain on a CPU.
    """

    features = 256

    def __init__(self, small_stem: bool = True) -> None:
        super().__init__()
        if small_stem:
            self.conv1 = nn.Conv2d(3, 32, kernel_size=3, stride=1, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, 32, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(_block(32, 64, stride=1))
        self.layer2 = nn.Sequential(_block(64, 128, stride=2))
        self.layer3 = nn.Sequential(_block(128, 256, stride=2))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 256]."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = self.layer3(self.layer2(self.layer1(maps)))
        return torch.flatten(nn.functional.adaptive_avg_pool2d(maps, 1), 1)


def _block(width_in: int, width_out: int, stride: int) -> BasicBlock:
    shortcut = nn.Sequential(
        nn.Conv2d(width_in, width_out, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(width_out)
    )
    return BasicBlock(width_in, width_out, stride, shortcut)
