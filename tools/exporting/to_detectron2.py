"""detectron2: a pickle of numpy arrays under its names and, for bottleneck ResNets, the detection protocol of MoCo."""

from __future__ import annotations

import pickle
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torchvision
import yaml
from torch import Tensor, nn

from tools.exporting.job import ExportError, Job

SUFFIX = ".pkl"
LIBRARIES: tuple[str, ...] = ()
NORMALISATION = False
DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}
_BLOCK = re.compile(r"layer([1-4])\.(\d+)\.(?:(conv|bn)([123])|downsample\.([01]))\.(\w+)")
_STEM = re.compile(r"(conv|bn)1\.(\w+)")
# He et al., arXiv:1911.05722, section 4.2 and appendix: C4 on VOC 07+12 for 24k iterations, and on COCO for "2x".
_PROTOCOL: dict[str, Any] = {
    "VERSION": 2,
    "MODEL": {
        "META_ARCHITECTURE": "GeneralizedRCNN",
        "BACKBONE": {"FREEZE_AT": 0},
        "RESNETS": {"NORM": "SyncBN", "STRIDE_IN_1X1": False},
        "RPN": {"PRE_NMS_TOPK_TEST": 6000, "POST_NMS_TOPK_TEST": 1000},
        "ROI_HEADS": {"NAME": "Res5ROIHeadsWithNorm"},
    },
    "INPUT": {"FORMAT": "RGB", "MIN_SIZE_TEST": 800},
    "SOLVER": {"IMS_PER_BATCH": 16, "BASE_LR": 0.02},
    "TEST": {"PRECISE_BN": {"ENABLED": True}},
}
_SETS: dict[str, dict[str, Any]] = {
    "voc": {
        "MODEL": {"MASK_ON": False, "ROI_HEADS": {"NUM_CLASSES": 20}},
        "DATASETS": {"TRAIN": ["voc_2007_trainval", "voc_2012_trainval"], "TEST": ["voc_2007_test"]},
        "INPUT": {"MIN_SIZE_TRAIN": list(range(480, 801, 32))},
        "SOLVER": {"MAX_ITER": 24_000, "STEPS": [18_000, 22_000], "WARMUP_ITERS": 100},
    },
    "coco": {
        "MODEL": {"MASK_ON": True, "ROI_HEADS": {"NUM_CLASSES": 80}},
        "DATASETS": {"TRAIN": ["coco_2017_train"], "TEST": ["coco_2017_val"]},
        "INPUT": {"MIN_SIZE_TRAIN": list(range(640, 801, 32))},
        "SOLVER": {"MAX_ITER": 180_000, "STEPS": [120_000, 160_000]},
    },
}


def refusal(arch: str, small: bool) -> str | None:
    if arch not in DEPTHS:
        return f"detectron2 has no {arch}; it takes {', '.join(DEPTHS)} with the ImageNet stem"
    return "detectron2's ResNets have the ImageNet stem only, and this encoder has the small one" if small else None


def beside(arch: str) -> tuple[str, ...]:
    """detectron2's C4 head is made of bottleneck blocks, so the protocol is for ResNet-50 and 101 only."""
    return ("-voc.yaml", "-coco.yaml", "-train.py") if DEPTHS[arch] >= 50 else ()


def detectron2_name(name: str) -> str:
    """detectron2's name of an encoder's tensor: ``layer1.0.bn2.bias`` is ``res2.0.conv2.norm.bias``.

    Raises:
        ExportError: no part of a ResNet has this name.
    """
    if match := _STEM.fullmatch(name):
        kind, tensor = match.groups()
        return f"stem.conv1.{tensor}" if kind == "conv" else f"stem.conv1.norm.{tensor}"
    if match := _BLOCK.fullmatch(name):
        layer, block, kind, number, shortcut, tensor = match.groups()
        part = "shortcut" if shortcut else f"conv{number}"
        norm = "norm." if kind == "bn" or shortcut == "1" else ""
        return f"res{int(layer) + 1}.{block}.{part}.{norm}{tensor}"
    raise ExportError(f"{name} has no counterpart in detectron2's ResNets")


def write(job: Job, path: Path) -> None:
    arrays = {detectron2_name(name): value.numpy() for name, value in job.module.state_dict().items()}
    content = {"model": arrays, "__author__": "Twinstream", "matching_heuristics": True}
    with path.open("wb") as file:
        _Pickler(file, protocol=4).dump({**content, "twinstream": job.metadata(how_to_load(job, job.output.name))})
    script = Path(__file__).with_name("detectron2_train.py")
    for ending in beside(job.arch):
        other = path.with_name(path.stem + ending)
        config = ending.removeprefix("-").removesuffix(".yaml")
        other.write_text(_yaml(job, config) if config in _SETS else script.read_text())


def read(job: Job, path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        arrays = pickle.load(file)["model"]
    model = getattr(torchvision.models, job.arch)(weights=None)
    model.fc = nn.Identity()
    names = {name: detectron2_name(name) for name in model.state_dict()}
    if set(names.values()) != set(arrays):
        raise ExportError(f"{job.arch} and the pickle differ in {sorted(set(names.values()) ^ set(arrays))}")
    model.load_state_dict({name: torch.from_numpy(arrays[other]) for name, other in names.items()})
    return cast(Callable[[Tensor], Tensor], model.eval())


def checked_by() -> str:
    return f"torchvision {torchvision.__version__} with the names undone"


def how_to_load(job: Job, path: str) -> str:
    if beside(job.arch):
        script, config = (shlex.quote(path.removesuffix(SUFFIX) + ending) for ending in ("-train.py", "-voc.yaml"))
        return f"python {script} --config-file {config} --num-gpus 8"
    mean, std = _pixels(job)
    return (
        f"cfg.merge_from_list(['MODEL.WEIGHTS', {path!r}, 'MODEL.RESNETS.DEPTH', {DEPTHS[job.arch]},"
        " 'MODEL.RESNETS.RES2_OUT_CHANNELS', 64, 'MODEL.RESNETS.STRIDE_IN_1X1', False, 'INPUT.FORMAT', 'RGB',"
        f" 'MODEL.PIXEL_MEAN', {mean}, 'MODEL.PIXEL_STD', {std}])"
    )


def _yaml(job: Job, name: str) -> str:
    mean, std = _pixels(job)
    own = {
        "MODEL": {
            "WEIGHTS": str(job.output.resolve()),
            "PIXEL_MEAN": mean,
            "PIXEL_STD": std,
            "RESNETS": {"DEPTH": DEPTHS[job.arch]},
        }
    }
    settings = _merged(_merged(_PROTOCOL, _SETS[name]), own)
    comment = f"# To be run by {job.output.stem}-train.py: detectron2 itself does not have Res5ROIHeadsWithNorm.\n"
    return comment + yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=120)


def _pixels(job: Job) -> tuple[list[float], list[float]]:
    """Mean and std of pixels from 0 to 255."""
    mean, std = ([round(255 * value, 6) for value in job.about[name]] for name in ("mean", "std"))
    return mean, std


def _merged(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], other[key]) for key in base.keys() & other.keys() if isinstance(base[key], dict)}
    return {**base, **other, **both}


class _Pickler(pickle.Pickler):
    """Pickles arrays so that any numpy can read them: numpy 2's own way names a module that older ones lack."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented
