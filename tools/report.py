"""Writes one or several runs as a single HTML page that needs no network.

    python -m tools.report runs/quickstart                        # writes runs/quickstart/report.html
    python -m tools.report runs/simclr runs/nnclr --output simclr-nnclr.html
    python -m tools.report runs/imagenet --images 500             # quicker: fewer images are embedded

Curves, evaluations and recipes are read from the run folders. Views, neighbours, similarities and maps are made of
the run's data and newest checkpoint, never of test; where these are missing the page says so. The exit code is 0, or 2
where no page could be written.
"""

from __future__ import annotations

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from configs.recipe import RecipeError
from tools.reporting.curves import curves
from tools.reporting.html import page
from tools.reporting.pictures import look, picture_sections
from tools.reporting.records import evaluations, overview, recipes
from tools.reporting.runs import RunFolder, read_runs

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


@app.command()
def main(
    paths: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders, such as runs/quickstart.")],
    output: Annotated[
        Path | None, typer.Option(help="The page to write; RUN/report.html, of several runs ./report.html.")
    ] = None,
    images: Annotated[int, typer.Option(min=10, help="At most so many held-out images are embedded.")] = 2000,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where images are embedded.")] = "auto",
) -> None:
    """Write runs as one HTML page: curves, views, neighbours, similarities, maps, evaluations, side by side."""
    try:
        chosen = _device(device)
        runs = read_runs(paths)
        target = _where_to_write(output, paths)
        _write(target, _render(runs, images, chosen))
    except (RecipeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    console.print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")


def _render(runs: list[RunFolder], images: int, device: torch.device) -> str:
    with console.status("looking") as status:
        looked = [look(run, images, device, status.update) for run in runs]
    sections = [overview(runs), curves(runs), evaluations(runs), *picture_sections(runs, looked), recipes(runs)]
    names = ", ".join(run.name for run in runs)
    written = f"Written {datetime.now():%Y-%m-%d %H:%M} from {', '.join(str(run.path) for run in runs)}"
    return page(f"Pretraining report: {names}", written, sections)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda, but no CUDA device is available; choose auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _where_to_write(output: Path | None, runs: list[Path]) -> Path:
    """The path of the page, in a folder that can be written to."""
    if output is None:
        output = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    if output.suffix not in (".html", ".htm"):
        raise RecipeError(f"--output {output}: expected a name that ends in .html")
    if output.is_dir():
        raise RecipeError(f"--output {output} is a folder; name the file")
    if not os.access(output.parent, os.W_OK):
        raise RecipeError(f"--output {output}: {output.parent} is not a folder that can be written to")
    return output


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text, encoding="utf-8", errors="replace")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


if __name__ == "__main__":
    app()
