"""A CLIP model of a few thousand weights, random ones, in the files that real ones come in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipelines.views import View
from tests.trainers.small_runs import BATCH, SmallEncoder, facts
from trainers.methods import build_method
from trainers.methods.clipdistill import Config

VIT: dict[str, Any] = {"image_size": 16, "layers": 2, "width": 32, "patch_size": 4, "head_width": 16}
RESNET: dict[str, Any] = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}  # with BatchNorm
TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
READING: dict[str, Any] = {**TEXT, "context_length": 16, "vocab_size": 49_408}  # the tokens of CLIP's own tokenizer
PLAIN = (View(crop="center"), View(crop="random_resized"))
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # not CLIP's usual ones


def model_config(vision: dict[str, Any] = VIT, text: dict[str, Any] = TEXT) -> dict[str, Any]:
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}


def write_teacher(folder: Path, vision: dict[str, Any] = VIT, text: dict[str, Any] = TEXT) -> str:
    """Write a model with its weights and statistics; returns the name of the teacher."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed (pip install 'twinstream[clip]')")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = open_clip.CLIP(**model_config(vision, text))
        with torch.no_grad():  # small initial weights would show all images alike
            for name, parameter in model.visual.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(3 if "conv1" not in name else 10)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    settings = {"model_cfg": model_config(vision, text), "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return f"local-dir:{folder}"


def settings(teacher: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Of the method clipdistill, with small heads."""
    heads = {} if changes.get("mode") == "supervised" else {"projector": {"hidden": 32, "output": 16}}
    return teacher | heads | changes


def plain_method(given: dict[str, Any], plan: tuple[View, ...] = PLAIN, dtype: torch.dtype = torch.float64) -> Any:
    """The method clipdistill with `given` settings, on the 48 images of two steps."""
    torch.manual_seed(0)
    config = Config.model_validate({"name": "clipdistill", **given})
    return build_method(config, SmallEncoder(), facts(plan=plan, images=2 * BATCH)).to(dtype)
