"""Writes the encoder of a run, or of exported weights, for other libraries.

    python -m tools.export runs/simclr-… --to torchvision
    python -m tools.export runs/simclr-… --to onnx --with-normalisation --output encoder.onnx
    python -m tools.export encoder.safetensors --to detectron2

What is written is loaded again as its users will, and kept only if it gives the encoder's features. It carries the
architecture, the statistics of its inputs, run, step and the weights' hash. Nothing is overwritten without --force. The
exit code is 0, or 2 where nothing could be written.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer
from safetensors import SafetensorError

from configs.recipe import RecipeError
from tools.exporting import to_detectron2, to_onnx, to_pt2, to_timm, to_torchscript, to_torchvision
from tools.exporting.checking import largest_deviation
from tools.exporting.job import ExportError, Format, Job, load_and_describe
from tools.exporting.writing import all_outputs, drafts, where_to_write
from trainers.state import CheckpointError

FORMATS: dict[str, Format] = {
    "torchvision": to_torchvision,
    "timm": to_timm,
    "torchscript": to_torchscript,
    "pt2": to_pt2,
    "onnx": to_onnx,
    "detectron2": to_detectron2,
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    target: Annotated[
        Path | None, typer.Argument(metavar="RUN_OR_WEIGHTS", help="A run folder or encoder.safetensors.")
    ] = None,
    to: Annotated[str | None, typer.Option(help=", ".join(FORMATS) + ".")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file to write; encoder-FORMAT in the run's folder unless given.")
    ] = None,
    with_normalisation: Annotated[
        bool, typer.Option("--with-normalisation", help="Images in [0, 1] go in: (x - mean) / std is in the graph.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write an encoder for another library, and check that it gives the same features there."""
    try:
        if target is None or to is None:
            raise RecipeError(f"name a run folder or weights, and --to one of {', '.join(FORMATS)}")
        print(export(target, to, output, with_normalisation=with_normalisation, force=force))
    except (RecipeError, CheckpointError, ExportError, SafetensorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None


def export(
    target: Path, to: str, output: Path | None = None, *, with_normalisation: bool = False, force: bool = False
) -> str:
    """Write and check; returns the line that says so, and how to load the file.

    Raises:
        RecipeError: an option that cannot be followed.
        CheckpointError: ``target`` holds no encoder.
        ExportError: the format cannot hold this encoder, or what was written did not give its features.
    """
    form = _find_format(to, with_normalisation)
    module, about = load_and_describe(target)
    if reason := form.refusal(about["arch"], about["stem"] == "small"):
        raise ExportError(f"{target}: {reason}")
    output = where_to_write(target, output, to, form.SUFFIX)
    paths = all_outputs(output, form.beside(about["arch"]), force=force)
    job = Job(module, {"format": to, **about}, output, with_normalisation)
    with drafts(paths) as written:
        form.write(job, written[0])
        deviation = largest_deviation(job, form.read(job, written[0]))
    others = f" (and {', '.join(path.name for path in paths[1:])})" if paths[1:] else ""
    return (
        f"{output}{others}: {job.arch}, {about['features']} features, {output.stat().st_size / 1e6:.1f} MB;"
        f" checked by {form.checked_by()}: largest deviation {deviation:.1e} of the largest feature;"
        f" load: {form.how_to_load(job, str(output))}"
    )


def _find_format(to: str, with_normalisation: bool) -> Format:
    if to not in FORMATS:
        raise RecipeError(f"--to {to} is not known; choose {', '.join(FORMATS)}")
    form = FORMATS[to]
    if with_normalisation and not form.NORMALISATION:
        able = ", ".join(name for name, other in FORMATS.items() if other.NORMALISATION)
        raise RecipeError(f"--with-normalisation is for {able}; --to {to} holds weights alone")
    absent = [name for name in form.LIBRARIES if importlib.util.find_spec(name) is None]
    if absent:
        raise RecipeError(f"--to {to} needs {', '.join(absent)}: pip install 'twinstream[export]'")
    return form


if __name__ == "__main__":
    app()
