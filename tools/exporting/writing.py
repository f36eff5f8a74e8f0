"""Where files go, and how none is ever half written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from configs.recipe import RecipeError


def where_to_write(target: Path, output: Path | None, to: str, suffix: str) -> Path:
    """``output``, or ``encoder-FORMAT.SUFFIX`` in the run's folder, ``NAME-FORMAT.SUFFIX`` beside weights.

    Raises:
        RecipeError: another suffix, a folder that cannot be written to, or the weights themselves.
    """
    if output is None:
        folder, stem = (target, "encoder") if target.is_dir() else (target.parent, target.stem)
        output = folder / f"{stem}-{to}{suffix}"
    if output.suffix != suffix:
        raise RecipeError(f"--output {output}: expected a name that ends in {suffix}")
    if not os.access(output.parent, os.W_OK) or not output.parent.is_dir():
        raise RecipeError(f"--output {output}: {output.parent} is not a folder that can be written to")
    if output.exists() and output.samefile(target):
        raise RecipeError(f"--output {output}: these are the weights to export; choose another name")
    return output


def all_outputs(output: Path, endings: Sequence[str], *, force: bool) -> list[Path]:
    """``output`` and those beside it, free to be written.

    Raises:
        RecipeError: one is there (and not ``force``).
    """
    paths = [output, *(output.with_name(output.stem + ending) for ending in endings)]
    for path in paths:
        if path.is_dir() or (path.exists() and not force):
            raise RecipeError(f"{path} is there already; choose another --output, or overwrite it with --force")
    return paths


@contextmanager
def drafts(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths of the same names in a folder beside them; what was written there takes its place at a good end only."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=paths[0].parent) as folder:
        written = [Path(folder) / path.name for path in paths]
        yield written
        for draft, path in reversed(list(zip(written, paths, strict=True))):  # the first says that all are there
            draft.chmod(0o666 & ~_umask())  # safetensors makes its files private
            draft.replace(path)


def _umask() -> int:
    """The process's mask of file modes, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
