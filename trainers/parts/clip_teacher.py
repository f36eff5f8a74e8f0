"""A CLIP image tower as a teacher: loaded by open_clip, frozen, and no part of any module's state."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.transfer import to_device
from pipelines.sources import DataError

_ROWS = 64  # images embedded at a time, always as many: the numbers must not depend on which others come along
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_WEIGHTS = "open_clip_model.safetensors"  # of a model on the hub, unless its entry names another file


class ClipTeacher:
    """Embeds normalised views as the image tower of a CLIP model would their images.

    It is deliberately no ``nn.Module``: an attribute of one, it appears neither in its parameters nor in its state.

    Args:
        name: a model of open_clip (``ViT-B-16``), ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``.
        pretrained: the tag of its weights, or their file; None where the name already says which.
        mean, std: what the views are normalised with.
        interpolation: how they are resized to the size that the tower takes.
        own_statistics: whether they are normalised anew with the CLIP model's mean and std.

    Raises:
        DataError: open_clip is not installed, or the weights are not at hand; the message says how to get them.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | None,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        own_statistics: bool = True,
    ) -> None:
        model = load_clip(name, pretrained)
        self._tower: nn.Module = model.visual.eval().requires_grad_(False)
        settings = self._tower.preprocess_cfg
        size = settings["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else tuple(size)
        self._views = torch.tensor([mean, std]).view(2, 3, 1, 1)
        self._images = torch.tensor([settings["mean"], settings["std"]]).view(2, 3, 1, 1)
        self._interpolation, self._own_statistics = interpolation, own_statistics
        self._place: tuple[torch.device, torch.dtype] | None = None
        with torch.no_grad():
            self.width = _rows_of(self._tower(torch.zeros(1, 3, *self.size))).shape[1]

    @torch.no_grad()
    def embed(self, views: Tensor) -> Tensor:
        """views [n, 3, H, W] -> [n, width] float16, not normalised; on their device, where the tower moves.

        Computes in float32 on a CPU (float64 views: in that) and in float16 on a GPU. What an image gives does not
        depend on the others.
        """
        views = views if views.dtype == torch.float64 else views.float()
        if self._place != (views.device, views.dtype):
            self._place = (views.device, views.dtype)
            self._tower.to(*self._place)
        rows = []
        for part in views.split(_ROWS):
            images = self.prepare(F.pad(part, (0, 0, 0, 0, 0, 0, 0, _ROWS - len(part))))
            with torch.autocast(views.device.type, torch.float16, enabled=views.device.type == "cuda"):
                found = _rows_of(self._tower(images))
            rows.append(found[: len(part)].half())
        return torch.cat(rows) if rows else views.new_empty(0, self.width, dtype=torch.float16)

    def state(self) -> dict[str, Tensor]:
        """The tower's weights, for whoever must tell one teacher from another."""
        return dict(self._tower.state_dict())

    def prepare(self, views: Tensor) -> Tensor:
        """views [n, 3, H, W] -> [n, 3, *size], as the tower takes them."""
        if not self._own_statistics:
            return self._resized(views)
        (mean, std), (new_mean, new_std) = (
            to_device(s.to(views.dtype), views.device) for s in (self._views, self._images)
        )
        # Cubic curves overshoot; an image's pixels are cut off there.
        return (self._resized(views * std + mean).clamp(0, 1) - new_mean) / new_std

    def _resized(self, images: Tensor) -> Tensor:
        if tuple(images.shape[2:]) == self.size:
            return images
        return F.interpolate(images, self.size, mode=self._interpolation, antialias=True, align_corners=False)


def _rows_of(output: Any) -> Tensor:
    """CoCa's come with their tokens."""
    rows: Tensor = output[0] if isinstance(output, tuple) else output
    return rows


def load_clip(name: str, pretrained: str | None) -> Any:
    """The model with its weights, on the CPU."""
    try:
        import open_clip
    except ImportError as error:
        raise DataError(
            "method.name=clipdistill needs open_clip, which is not installed: pip install 'twinstream[clip]'"
        ) from error
    _check_names(open_clip, name, pretrained)
    try:
        # The weights it is initialised with are drawn: the student's must not depend on how many those are.
        with torch.random.fork_rng(devices=()), root_logger_left_alone():
            return open_clip.create_model(name, pretrained=pretrained, require_pretrained=True, weights_only=True)
    except Exception as error:  # of whatever kind the hub, the file or the model raise
        raise DataError(_advice(open_clip, name, pretrained, _reason(error))) from error


def _check_names(open_clip: Any, name: str, pretrained: str | None) -> None:
    """Refuse what cannot be: before anything is fetched."""
    if ":" in name:
        return
    models, tags = open_clip.list_models(), open_clip.list_pretrained_tags_by_model(name)
    if name not in models:
        raise DataError(f"method.teacher={name}: open_clip has no such model{_nearest(name, models)}")
    path = Path(str(pretrained))
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise DataError(f"method.pretrained={pretrained}: expected weights as {', '.join(_SUFFIXES)}")
        return
    entry = open_clip.get_pretrained_cfg(name, pretrained)
    if not entry:
        raise DataError(
            f"method.pretrained={pretrained} is neither a file nor weights that open_clip knows of {name}"
            f"{_nearest(str(pretrained), tags)}; there are {', '.join(tags) or 'none'}"
        )
    if entry.get("quick_gelu", False) and not open_clip.get_model_config(name).get("quick_gelu", False):
        raise DataError(
            f"method.pretrained={pretrained} was trained with QuickGELU, which {name} computes otherwise; set"
            f" method.teacher={name}-quickgelu"
        )


def _advice(open_clip: Any, name: str, pretrained: str | None, reason: str) -> str:
    """What went wrong with weights that are known by their name, and what to do."""
    if name.startswith("local-dir:"):
        return f"method.teacher={name} cannot be loaded ({reason}); it needs open_clip_config.json and {_WEIGHTS}"
    if pretrained is not None and Path(pretrained).is_file():
        return (
            f"method.pretrained={pretrained} does not hold the weights of {name} as tensors alone ({reason}); give the"
            " file of this very model, as .safetensors or as a state_dict"
        )
    if name.startswith("hf-hub:"):
        what, folder = f"method.teacher={name}", name.removeprefix("hf-hub:")
        fetch, setting = f"hf download {folder}", "method.teacher=local-dir:teacher"
    else:
        what = f"method.pretrained={pretrained} (of method.teacher={name})"
        entry = open_clip.get_pretrained_cfg(name, pretrained)
        folder, file = os.path.split(entry["hf_hub"])
        fetch, setting = f"hf download {folder} {file or _WEIGHTS}", f"method.pretrained=teacher/{file or _WEIGHTS}"
        if entry.get("mean") not in (None, open_clip.OPENAI_DATASET_MEAN):  # which the weights alone do not say
            fetch = f"hf download {folder} {file or _WEIGHTS} open_clip_config.json"
            setting = "method.teacher=local-dir:teacher method.pretrained=null"
    return (
        f"{what} is not on this machine and cannot be fetched ({reason}); where there is a network: {fetch} --local-dir"
        f" teacher; bring that folder here and set {setting}"
    )


def _reason(error: BaseException) -> str:
    """What was at the bottom of it, in a line."""
    if "weights_only" in str(error):  # PyTorch goes on to advise how to run it nevertheless
        return "it is a program that would have to be run"
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return " ".join((str(error) or type(error).__name__).split())[:200]


def _nearest(word: str, known: list[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f" (nearest: {found[0]})" if found else ""


@contextmanager
def root_logger_left_alone() -> Iterator[None]:
    """open_clip logs by ``logging.info``, which would give the root logger a handler for the rest of the process."""
    quiet = logging.NullHandler()
    logging.getLogger().addHandler(quiet)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(quiet)
