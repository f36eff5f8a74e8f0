"""torchvision's Faster R-CNN around a pretrained encoder: on its fourth stage (C4), or on a feature pyramid (FPN)."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipelines.sources import DataError
from trainers.features import FrozenEncoder

STEM = ("conv1", "bn1", "relu", "maxpool")
RATIOS = (0.5, 1.0, 2.0)
PYRAMID, CONNECTED = 256, 1024  # widths of the pyramid's maps and of the fully connected layers on them


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one image."""

    sides: tuple[int, ...]  # short sides in pixels to train at, one drawn for each image
    longest: int  # that the long side may become
    regions: int  # that go through the box head in training
    test_regions: int  # and in evaluation


def build_detector(
    encoder: FrozenEncoder,
    model: str,
    classes: int,
    sizes: Sizes,
    *,
    train_batchnorm: bool = True,
    extra_norm: bool = True,
    freeze: int = 0,
    seed: int = 0,
) -> FasterRCNN:
    """A detector of ``classes`` (without the background) that starts from a copy of the encoder's weights.

    ``c4``: regions are proposed and cut (14x14) on layer3; layer4, mean and one linear layer tell what they are, as in
    detectron2's R50-C4, with a BatchNorm after layer4 if ``extra_norm`` (MoCo, arXiv:1911.05722, appendix).
    ``fpn``: a pyramid over all stages and two fully connected layers (arXiv:1612.03144).
    Anchors grow with the strides: with the ImageNet stem they are the usual 32 to 512 pixels.

    Args:
        train_batchnorm: otherwise the encoder's BatchNorm keeps its statistics, scales and shifts, and none is added.
        freeze: how many of stem, layer1, layer2, … keep their weights.
        seed: of the weights that the encoder does not bring.

    Raises:
        DataError: an encoder without layers, or c4 of one without layer4.
    """
    if encoder.module is None:
        raise DataError("detect trains an encoder; raw pixels have none")
    trunk = copy.deepcopy(encoder.module).requires_grad_(True).cpu()
    layers = [name for name, _ in trunk.named_children() if name.startswith("layer")]
    if model == "c4" and "layer4" not in layers:
        raise DataError(f"model=c4 needs an encoder with layer4; {encoder.label} ends with {layers[-1]}; use model=fpn")
    if freeze > len(layers):  # stem and all layers but the last
        raise DataError(f"freeze={freeze} leaves nothing to train of an encoder with a stem and {len(layers)} layers")
    if not train_batchnorm:
        _freeze_batchnorm(trunk)
    for name in [*(STEM if freeze else ()), *layers[: max(0, freeze - 1)]]:
        setattr(trunk, name, _freeze_batchnorm(getattr(trunk, name).requires_grad_(False)))
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d if train_batchnorm else None
    more = {
        "min_size": sizes.sides,
        "max_size": sizes.longest,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
        "box_batch_size_per_image": sizes.regions,
        "rpn_post_nms_top_n_test": sizes.test_regions,
    }
    if model == "c4":
        return _c4(trunk, layers, classes, norm if extra_norm else None, more)
    return _fpn(trunk, layers, classes, norm, more)


def _c4(
    trunk: nn.Module,
    layers: list[str],
    classes: int,
    norm: type[nn.BatchNorm2d] | None,
    more: dict[str, object],
) -> FasterRCNN:
    backbone = _in_order(trunk, layers[:-1])
    width, stride = _shapes(backbone)[-1]
    backbone.out_channels = width  # type: ignore[assignment]
    features = int(trunk.features)  # type: ignore[arg-type]
    head = OrderedDict([("layer4", trunk.get_submodule("layer4"))])
    if norm is not None:
        head["norm"] = norm(features)
    head |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator((tuple(stride * scale for scale in (2, 4, 8, 16, 32)),), (RATIOS,)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=14, sampling_ratio=0),
        box_head=nn.Sequential(head),
        box_predictor=FastRCNNPredictor(features, classes + 1),
        rpn_pre_nms_top_n_train=12_000,
        rpn_pre_nms_top_n_test=6_000,
        **more,
    )


def _fpn(
    trunk: nn.Module,
    layers: list[str],
    classes: int,
    norm: type[nn.BatchNorm2d] | None,
    more: dict[str, object],
) -> FasterRCNN:
    body = _in_order(trunk, layers)
    shapes = _shapes(body)[-len(layers) :]
    names = {name: str(number) for number, name in enumerate(layers)}
    widths = [width for width, _ in shapes]
    backbone = BackboneWithFPN(body, names, widths, PYRAMID, extra_blocks=LastLevelMaxPool(), norm_layer=norm)
    strides = [stride for _, stride in shapes]
    sizes = tuple((8 * stride,) for stride in (*strides, 2 * strides[-1]))
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        box_roi_pool=MultiScaleRoIAlign(list(names.values()), output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(PYRAMID * 7 * 7, CONNECTED),
        box_predictor=FastRCNNPredictor(CONNECTED, classes + 1),
        **more,
    )


def _in_order(trunk: nn.Module, layers: list[str]) -> nn.Sequential:
    """Stem and layers as the encoder runs them."""
    return nn.Sequential(OrderedDict((name, getattr(trunk, name)) for name in (*STEM, *layers)))


@torch.no_grad()
def _shapes(body: nn.Sequential) -> list[tuple[int, int]]:
    """Channels and stride after each part."""
    was_training = body.training
    maps: Tensor = torch.zeros(1, 3, 128, 128)
    shapes = []
    body.eval()
    for part in body:
        maps = part(maps)
        shapes.append((maps.shape[1], math.ceil(128 / maps.shape[2])))
    body.train(was_training)
    return shapes


def _freeze_batchnorm(module: nn.Module) -> nn.Module:
    """With every BatchNorm of the module replaced by one that never changes."""
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, eps=module.eps)
        kept = {name: value for name, value in module.state_dict().items() if name != "num_batches_tracked"}
        frozen.load_state_dict(kept)
        return frozen
    for name, child in module.named_children():
        setattr(module, name, _freeze_batchnorm(child))
    return module
