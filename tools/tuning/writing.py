"""The recipe that is written: it extends the one that was tuned, and says how its values were found."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from configs.recipe import RecipeError, load_recipe, parse_overrides
from pipelines.foreign import load_yaml, read_text


def where_to_write(recipe: Path, output: Path | None, others: Sequence[str], *, force: bool) -> list[Path]:
    """The path of the recipe, and those beside it with other endings (such as ``-lr.png``), free to be written.

    Without ``output`` it is ``NAME-tuned.yaml`` beside the recipe, or in the current folder where that is read-only.

    Raises:
        RecipeError: the folder cannot be written, a file is there (and not ``force``), or the recipe builds on it.
    """
    if output is None:
        beside = recipe.parent if os.access(recipe.parent, os.W_OK) else Path()
        output = beside / f"{recipe.stem}-tuned.yaml"
    if output.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"--output {output}: expected a name that ends in .yaml")
    if not os.access(output.parent, os.W_OK):
        raise RecipeError(f"--output {output}: {output.parent} is not a folder that can be written to")
    paths = [output, *(output.with_name(output.stem + ending) for ending in others)]
    if output.resolve() in _built_on(recipe):
        raise RecipeError(f"--output {output}: {recipe} builds on this file; choose another name")
    for path in paths:
        if path.is_dir() or (path.exists() and not force):
            raise RecipeError(f"{path} is there already; choose another --output, or overwrite it with --force")
    return paths


def write_recipe(
    output: Path, recipe: Path, overrides: Sequence[str], found: dict[str, Any], comments: Sequence[str]
) -> None:
    """Write ``output``, which extends ``recipe`` by the overrides that it was tuned with and by what was found.

    ``found``: {"a.b": value}. It is read back before it takes the place of an older file.

    Raises:
        RecipeError: the result would not be a recipe that can be run.
    """
    changes = parse_overrides(overrides)
    for key, value in found.items():
        *sections, name = key.split(".")
        section = changes
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    base = os.path.relpath(recipe.resolve(), output.parent.resolve())
    lines = [
        line
        for comment in comments
        for line in textwrap.wrap(comment, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    ]
    text = "".join(f"# {line}\n" for line in lines)
    text += yaml.safe_dump({"extends": base, **changes}, sort_keys=False, allow_unicode=True)
    draft = output.with_name(f".{output.stem}.tmp{output.suffix}")
    try:
        draft.write_text(text)
        load_recipe(draft)
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)


def _built_on(recipe: Path) -> set[Path]:
    """The files of a recipe that loads: itself and all that it extends."""
    path = recipe.resolve()
    extended = (load_yaml(read_text(path)) or {}).get("extends") or []
    bases = [extended] if isinstance(extended, str) else extended
    return {path}.union(*(_built_on(path.parent / base) for base in bases))
