"""Encoders: torchvision's names, the right stem, the right width."""

import pytest
import torch
import torchvision

from trainers.encoders import EncoderConfig, build_encoder
from trainers.heads import ProjectorConfig, build_projector


@pytest.mark.parametrize(
    ("arch", "width"), [("resnet18", 512), ("resnet34", 512), ("resnet50", 2048), ("resnet101", 2048)]
)
def test_names_are_torchvisions_without_fc(arch: str, width: int) -> None:
    encoder = build_encoder(EncoderConfig(arch=arch), 224)
    expected = {n for n in getattr(torchvision.models, arch)().state_dict() if not n.startswith("fc.")}
    assert set(encoder.state_dict()) == expected
    assert encoder.features == width
    reference = getattr(torchvision.models, arch)()
    report = reference.load_state_dict(encoder.state_dict(), strict=False)
    assert sorted(report.missing_keys) == ["fc.bias", "fc.weight"]
    assert report.unexpected_keys == []


@pytest.mark.parametrize(
    ("size", "stem", "small"),
    [
        (32, "auto", True),
        (64, "auto", True),
        (65, "auto", False),
        (224, "small", True),
        (32, "imagenet", False),
    ],
)
def test_stem_by_image_size(size: int, stem: str, small: bool) -> None:
    for arch in ("resnet8x4", "resnet18"):
        encoder = build_encoder(EncoderConfig(arch=arch, stem=stem), size)
        conv = encoder.conv1
        kernel = (3, 1, 1) if small else (7, 2, 3)
        assert (conv.kernel_size[0], conv.stride[0], conv.padding[0]) == kernel
        assert isinstance(encoder.maxpool, torch.nn.Identity) is small


def test_resnet8x4_shapes_and_size() -> None:
    encoder = build_encoder(EncoderConfig(arch="resnet8x4"), 32)
    maps = {}
    for name in ("layer1", "layer2", "layer3"):
        getattr(encoder, name).register_forward_hook(lambda m, i, o, name=name: maps.update({name: tuple(o.shape[1:])}))
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 256)
    assert maps == {"layer1": (64, 32, 32), "layer2": (128, 16, 16), "layer3": (256, 8, 8)}
    # 3x3 and 1x1 convolutions and BatchNorms, counted by hand
    stem = 3 * 32 * 9 + 64
    blocks = sum(9 * a * b + 9 * b * b + a * b + 6 * b for a, b in ((32, 64), (64, 128), (128, 256)))
    assert sum(p.numel() for p in encoder.parameters()) == stem + blocks


def test_projector_layers() -> None:
    projector = build_projector(ProjectorConfig(layers=3, hidden=32, output=8), 16)
    assert [type(m).__name__ for m in projector] == [
        "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d",
    ]  # fmt: skip
    assert all(m.bias is None for m in projector if isinstance(m, torch.nn.Linear))
    plain = build_projector(ProjectorConfig(layers=1, output=8, batchnorm="none"), 16)
    assert [type(m).__name__ for m in plain] == ["Linear"]
    assert plain[0].bias is not None
    hidden = build_projector(ProjectorConfig(layers=2, output=8, batchnorm="hidden"), 16)
    assert [type(m).__name__ for m in hidden] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
    assert [m.bias is None for m in hidden if isinstance(m, torch.nn.Linear)] == [True, False]
    bare = build_projector(ProjectorConfig(layers=2, output=8, batchnorm="none", bias=False), 16)
    assert all(m.bias is None for m in bare if isinstance(m, torch.nn.Linear))
    assert projector(torch.randn(4, 16)).shape == plain(torch.randn(4, 16)).shape == (4, 8)
