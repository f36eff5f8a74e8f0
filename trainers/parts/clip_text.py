"""A CLIP text tower, and the prompts it is asked with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.sources import DataError
from trainers.parts.clip_teacher import load_clip, root_logger_left_alone

# "a photo of a {}." is that of arXiv:2103.00020, section 3.1.4; the others vary what it leaves open.
TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a dark photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a drawing of a {}.",
)
_ROWS = 256  # prompts embedded at a time


class ClipText:
    """Embeds prompts as the text tower of a CLIP model does; in evaluation mode, without its image tower.

    Raises:
        DataError: open_clip is not installed, or the weights or the tokenizer are not at hand.
    """

    def __init__(self, name: str, pretrained: str | None) -> None:
        model = load_clip(name, pretrained)
        model.visual = nn.Identity()
        self._model: Any = model.eval().requires_grad_(False)
        self._tokenizer, self._name = _tokenizer(name), name

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], device: torch.device) -> Tensor:
        """[n, width] float32, of length 1."""
        tokens = self._tokenizer(list(prompts))
        known = next(m.num_embeddings for m in self._model.modules() if isinstance(m, nn.Embedding))
        if int(tokens.max()) >= known:
            raise DataError(
                f"the text tower of {self._name} knows {known} tokens and its tokenizer gave {int(tokens.max())}: they"
                " do not belong together; see text_cfg in its open_clip_config.json"
            )
        model = self._model.to(device).float()
        rows = [model.encode_text(part.to(device)).float() for part in tokens.split(_ROWS)]
        return F.normalize(torch.cat(rows), dim=1)


def class_prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every template with every name, all of one class together; underscores are spaces."""
    return [template.replace("{}", name.replace("_", " ")) for name in names for template in templates]


def read_templates(path: Path | None) -> tuple[str, ...]:
    """The lines of a file, each with one {}; those of this module without one."""
    if path is None:
        return TEMPLATES
    lines = _lines(path, "templates")
    for line in lines:
        if line.count("{}") != 1:
            raise DataError(f"templates={path}: expected one {{}} in every line, for the class; got {line!r}")
    return tuple(lines)


def read_names(path: Path | None, classes: Sequence[str]) -> tuple[str, ...]:
    """What to call the classes: by themselves, or by a file.

    The file has a line for each class, "class name" in any order, or names alone in the order of the classes. Lines
    for other classes are no error in the first form, so one file of ImageNet's 1000 serves its subsets.

    Raises:
        DataError: a class without a name, or classes that no text could mean (n01440764).
    """
    if path is None:
        if unspeakable := [name for name in classes if re.fullmatch(r"n\d{8}", name)]:
            raise DataError(
                f"the classes are called {unspeakable[0]} and the like, which says nothing to a text tower; give their"
                " names as names=FILE, a line for each class: n01440764 tench"
            )
        return tuple(classes)
    lines = _lines(path, "names")
    pairs = dict(parts for line in lines if len(parts := line.split(maxsplit=1)) == 2)
    if all(name in pairs for name in classes):
        return tuple(pairs[name] for name in classes)
    if len(lines) != len(classes):
        raise DataError(
            f"names={path} has {len(lines)} lines, the data {len(classes)} classes; expected a line for each class, in"
            f" their order, or lines that begin with the class (such as {classes[0]})"
        )
    return tuple(lines)


def _lines(path: Path, key: str) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{key}={path} cannot be read: {error}") from error
    if not lines:
        raise DataError(f"{key}={path} is empty")
    return lines


def _tokenizer(name: str) -> Any:
    import open_clip  # load_clip has said so already if it is not installed

    try:
        with root_logger_left_alone():
            return open_clip.get_tokenizer(name)
    except Exception as error:  # of whatever kind the hub or the tokenizer's files raise
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the tokenizer of {name} is not on this machine and cannot be fetched ({reason})") from error
