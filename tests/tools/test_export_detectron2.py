"""`python -m tools.export --to detectron2`: names against detectron2's structure, values by a network that has them."""

from __future__ import annotations

import importlib.util
import json
import pickle
import pickletools
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from tools import export
from tools.exporting.job import ExportError
from tools.exporting.to_detectron2 import detectron2_name
from trainers.encoders import EncoderConfig, build_encoder

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


def names_of(arch: str) -> set[str]:
    """What a ResNet of detectron2 has in its state dict, written down from detectron2/modeling/backbone/resnet.py: a
    stem, res2 to res5, a shortcut where a stage changes the width, a norm inside each convolution."""
    bottleneck = arch in ("resnet50", "resnet101")
    convolutions = ["stem.conv1"]
    for stage, blocks in zip(("res2", "res3", "res4", "res5"), BLOCKS[arch], strict=True):
        for block in range(blocks):
            convolutions += [f"{stage}.{block}.conv{i}" for i in ((1, 2, 3) if bottleneck else (1, 2))]
            if block == 0 and (bottleneck or stage != "res2"):
                convolutions.append(f"{stage}.{block}.shortcut")
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{c}.weight" for c in convolutions} | {f"{c}.norm.{part}" for c in convolutions for part in parts}


class Conv(nn.Conv2d):
    """A convolution with its norm inside, as detectron2's."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inside, outside, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Block(nn.Module):
    """A bottleneck block; STRIDE_IN_1X1 is false."""

    def __init__(self, inside: int, middle: int, stride: int) -> None:
        super().__init__()
        self.shortcut = Conv(inside, 4 * middle, 1, stride) if inside != 4 * middle else None
        self.conv1, self.conv2 = Conv(inside, middle, 1), Conv(middle, middle, 3, stride)
        self.conv3 = Conv(middle, 4 * middle, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))
        return F.relu(out + (x if self.shortcut is None else self.shortcut(x)))


class Backbone(nn.Module):
    """ResNet-50 under detectron2's names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = Conv(3, 64, 7, 2)
        inside = 64
        for i, blocks in enumerate(BLOCKS["resnet50"]):
            middle, stage = 64 * 2**i, nn.Sequential()
            for block in range(blocks):
                stage.append(Block(inside, middle, 2 if i > 0 and block == 0 else 1))
                inside = 4 * middle
            self.add_module(f"res{i + 2}", stage)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem.conv1(x)), 3, 2, 1)
        return self.res5(self.res4(self.res3(self.res2(x)))).mean((2, 3))


def weights_of(arch: str, folder: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(arch=arch, stem="imagenet"), 32)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    about = {"arch": arch, "stem": "imagenet", "image_size": 32, "mean": MEAN, "std": STD, "run": "r", "step": 3}
    path = folder / f"{arch}.safetensors"
    save_file(encoder.state_dict(), path, metadata={"twinstream": json.dumps(about)})
    return encoder.eval(), path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, str]:
    """A ResNet-50, the folder of what was written for it, and what the tool said."""
    folder = tmp_path_factory.mktemp("detectron2")
    encoder, path = weights_of("resnet50", folder)
    done = CliRunner().invoke(export.app, [str(path), "--to", "detectron2", "--output", str(folder / "r50.pkl")])
    assert done.exit_code == 0, done.output
    return encoder, folder, done.stdout


def test_the_pickle_is_what_detectron2_reads(written: tuple[nn.Module, Path, str]) -> None:
    with (written[1] / "r50.pkl").open("rb") as file:
        content = pickle.load(file, encoding="latin1")  # as its DetectionCheckpointer does
    assert content["__author__"] == "Twinstream"
    assert content["matching_heuristics"] is True
    arrays = content["model"]
    assert set(arrays) == names_of("resnet50")
    assert len(arrays) == 53 + 53 * 5
    assert all(type(value) is np.ndarray and value.flags.writeable for value in arrays.values())
    about = json.loads(content["twinstream"])
    assert (about["arch"], about["run"], about["step"], about["mean"]) == ("resnet50", "r", 3, MEAN)


def test_a_network_with_detectron2s_names_gives_the_same_features(written: tuple[nn.Module, Path, str]) -> None:
    with (written[1] / "r50.pkl").open("rb") as file:
        arrays = pickle.load(file)["model"]
    network = Backbone().eval()
    network.load_state_dict({name: torch.from_numpy(value) for name, value in arrays.items()}, strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = written[0](images)
        assert (network(images) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("arch", BLOCKS)
def test_every_name_has_its_counterpart(arch: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig(arch=arch, stem="imagenet"), 32)
    renamed = [detectron2_name(name) for name in encoder.state_dict()]
    assert len(set(renamed)) == len(renamed)
    assert set(renamed) == names_of(arch)


@pytest.mark.parametrize("name", ["fc.weight", "layer5.0.conv1.weight", "layer1.0.conv4.weight", "projector.0.weight"])
def test_another_name_is_an_error(name: str) -> None:
    with pytest.raises(ExportError, match=name):
        detectron2_name(name)


def test_arrays_are_pickled_for_any_numpy(written: tuple[nn.Module, Path, str]) -> None:
    """numpy 1 has no numpy._core, which numpy 2 names in its own pickles."""
    named, strings = set(), []
    for code, value, _ in pickletools.genops((written[1] / "r50.pkl").read_bytes()):
        if code.name == "SHORT_BINUNICODE":
            strings.append(value)
        elif code.name == "STACK_GLOBAL":
            named.add(".".join(strings[-2:]))
    assert named == {"numpy.ndarray", "builtins.bytearray"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            "voc",
            {
                "MODEL.MASK_ON": False,
                "MODEL.ROI_HEADS.NUM_CLASSES": 20,
                "DATASETS.TRAIN": ["voc_2007_trainval", "voc_2012_trainval"],
                "DATASETS.TEST": ["voc_2007_test"],
                "INPUT.MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
                "SOLVER.MAX_ITER": 24000,
                "SOLVER.STEPS": [18000, 22000],
                "SOLVER.WARMUP_ITERS": 100,
            },
        ),
        (
            "coco",
            {
                "MODEL.MASK_ON": True,
                "MODEL.ROI_HEADS.NUM_CLASSES": 80,
                "DATASETS.TRAIN": ["coco_2017_train"],
                "DATASETS.TEST": ["coco_2017_val"],
                "INPUT.MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800],
                "SOLVER.MAX_ITER": 180000,
                "SOLVER.STEPS": [120000, 160000],
            },
        ),
    ],
)
def test_the_protocol_is_mocos(written: tuple[nn.Module, Path, str], config: str, expected: dict[str, Any]) -> None:
    folder = written[1]
    found = flat(yaml.safe_load((folder / f"r50-{config}.yaml").read_text()))
    weights = found.pop("MODEL.WEIGHTS")
    assert weights == str((folder / "r50.pkl").resolve())
    assert found == expected | {
        "VERSION": 2,
        "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.NORM": "SyncBN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsWithNorm",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
        "INPUT.MIN_SIZE_TEST": 800,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.BASE_LR": 0.02,
        "TEST.PRECISE_BN.ENABLED": True,
    }


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def test_the_script_beside_it_has_the_head_that_the_configurations_name(
    written: tuple[nn.Module, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for detectron2, which cannot be installed from PyPI."""
    heads: dict[str, type] = {}

    class Res5ROIHeads(nn.Module):
        def __init__(self, cfg: Any, input_shape: Any) -> None:
            super().__init__()
            self.res5 = nn.Sequential(nn.Identity(), nn.Identity())
            self.res5[-1].out_channels = 2048

    registry = SimpleNamespace(register=lambda: lambda cls: heads.setdefault(cls.__name__, cls))
    parts = {
        "": {},
        ".checkpoint": {"DetectionCheckpointer": object},
        ".config": {"get_cfg": None},
        ".data": {"MetadataCatalog": {"voc": SimpleNamespace(evaluator_type="pascal_voc")}},
        ".engine": dict.fromkeys(("default_argument_parser", "default_setup", "launch")) | {"DefaultTrainer": object},
        ".evaluation": {"COCOEvaluator": object, "PascalVOCDetectionEvaluator": lambda name: f"VOC's of {name}"},
        ".layers": {"get_norm": lambda norm, width: nn.BatchNorm2d(width) if norm == "SyncBN" else None},
        ".modeling": {},
        ".modeling.roi_heads": {"ROI_HEADS_REGISTRY": registry, "Res5ROIHeads": Res5ROIHeads},
    }
    for name, content in parts.items():
        module = ModuleType(f"detectron2{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("beside", written[1] / "r50-train.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    config = yaml.safe_load((written[1] / "r50-voc.yaml").read_text())["MODEL"]
    cfg = SimpleNamespace(MODEL=SimpleNamespace(RESNETS=SimpleNamespace(NORM=config["RESNETS"]["NORM"])))
    head = heads[config["ROI_HEADS"]["NAME"]](cfg, None)
    assert [name for name, _ in head.res5.named_children()] == ["0", "1", "norm"]
    assert head.res5.norm.num_features == 2048
    assert script.Trainer.build_evaluator(cfg, "voc") == "VOC's of voc"


def test_what_was_written_is_said(written: tuple[nn.Module, Path, str]) -> None:
    folder, said = written[1:]
    others = {path.name for path in folder.iterdir()} - {"resnet50.safetensors"}
    assert others == {"r50.pkl", "r50-voc.yaml", "r50-coco.yaml", "r50-train.py"}
    assert all(name in said for name in others)


def test_no_file_beside_it_is_overwritten(written: tuple[nn.Module, Path, str], tmp_path: Path) -> None:
    (tmp_path / "a-voc.yaml").write_text("mine")
    weights, output = str(written[1] / "resnet50.safetensors"), str(tmp_path / "a.pkl")
    done = CliRunner().invoke(export.app, [weights, "--to", "detectron2", "--output", output])
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'a-voc.yaml'} is there already")
    assert [path.name for path in tmp_path.iterdir()] == ["a-voc.yaml"]


def test_basic_blocks_get_the_pickle_alone(tmp_path: Path) -> None:
    _, path = weights_of("resnet18", tmp_path)
    done = CliRunner().invoke(export.app, [str(path), "--to", "detectron2"])
    assert done.exit_code == 0, done.output
    assert sorted(one.name for one in tmp_path.iterdir()) == ["resnet18-detectron2.pkl", "resnet18.safetensors"]
    assert "'MODEL.RESNETS.DEPTH', 18, 'MODEL.RESNETS.RES2_OUT_CHANNELS', 64" in done.stdout
    with (tmp_path / "resnet18-detectron2.pkl").open("rb") as file:
        assert set(pickle.load(file)["model"]) == names_of("resnet18")
