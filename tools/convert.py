"""Packs a set of images into FFCV's .beton, WebDataset tars or TFRecords, and verifies what was packed.

    python -m tools.convert cifar10 packed/cifar10 --to ffcv
    python -m tools.convert path/to/images packed/images --to webdataset --max-side 256
    python -m tools.convert packed/images --verify

The source is a name that data.source takes (with --root), a folder of images, or a packed folder or URL. The result
is used by data.root=packed/cifar10 with the same data.source. The same command resumes what was stopped.

The exit code is 0 where all is packed, 1 where images could not be read (0 with --skip-bad) or a verification found
defects, 2 where it could not be done. Files that are not named like images fail nothing; skipped.jsonl lists them too.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # imported when needed: worker processes import this module, and need no torch
    from pipelines.packed.conversion import Estimate
    from pipelines.packed.manifest import Manifest
    from pipelines.sources import DataConfig

_SHOWN = 20  # defects
_OVERRIDES = ("source", "download", "class_list")

_SKIP_BAD = (
    "Images that cannot be read are no failure. Files that are not named like images never are: they are counted, and "
    "listed in skipped.jsonl."
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# Names of files and classes are shown as they are: [bold] and :smile: have no meaning in them.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
if not console.is_terminal:
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=120)  # a log


@app.command()
def main(
    source: Annotated[str, typer.Argument(help="A data source by name, a folder of images, a packed folder or URL.")],
    destination: Annotated[str | None, typer.Argument(metavar="DEST", help="The folder to fill.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="data.key=value")] = None,
    to: Annotated[Literal["ffcv", "webdataset", "tfrecord"] | None, typer.Option(help="The format.")] = None,
    root: Annotated[Path | None, typer.Option(help="Where a source given by name lies.")] = None,
    parts: Annotated[
        str | None, typer.Option(help="train, test or train,test; all that there are unless given.")
    ] = None,
    max_side: Annotated[
        int, typer.Option(min=0, help="Larger images are reduced to this side, pixels; 0: none.")
    ] = 500,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEGs that are encoded anew.")] = 90,
    write_mode: Annotated[
        Literal["jpg", "raw", "proportion"], typer.Option(help="raw: pixels (tar, TFRecord: PNG); proportion: ffcv.")
    ] = "jpg",
    raw_share: Annotated[float, typer.Option(min=0, max=1, help="Of raw images, with proportion.")] = 0.5,
    jpeg: Annotated[
        Literal["keep", "encode"], typer.Option(help="keep: JPEGs within --max-side are stored byte for byte.")
    ] = "keep",
    shard_mb: Annotated[int, typer.Option(min=1, help="Size of a tar or TFRecord shard, MiB.")] = 256,
    shuffle: Annotated[
        str | None, typer.Option(help="Seed of the order inside shards, or none; 0 unless given. Not for ffcv.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes; 0: only this one; one a core unless given.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help=_SKIP_BAD)] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read everything again; without DEST, of SOURCE.")] = False,
) -> None:
    """Pack a set of images into a few large files; or, with --verify alone, check one."""
    from pipelines.packed.encode import Options

    pairs = list(overrides or [])
    if destination is not None and "=" in destination and not os.path.exists(destination):
        pairs.insert(0, destination)
        destination = None
    processes = _cores() if workers is None else workers
    with _readable_errors():
        if destination is None:
            if not verify:
                raise _misuse("name the folder to fill, or give --verify to check SOURCE")
            raise typer.Exit(_verify(source, processes))
        if to is None:
            raise _misuse("say what to convert to: --to ffcv, --to webdataset or --to tfrecord")
        if to != "ffcv" and write_mode == "proportion":
            raise _misuse("--write-mode proportion is for --to ffcv; shards take jpg, or raw (PNG)")
        if to == "ffcv" and shuffle is not None:
            raise _misuse("--shuffle is for shards; a .beton is read in any order, and stays in that of the source")
        options = Options(to, max_side, quality, write_mode, raw_share, jpeg, shard_mb, _seed(shuffle))
        config = _config(source, root, pairs)
        skipped = _convert(config, Path(destination), options, parts, processes)
        failed = bool(skipped and not skip_bad)
        if verify:
            failed |= bool(_verify(destination, processes))
    raise typer.Exit(1 if failed else 0)


def _convert(config: DataConfig, destination: Path, options: Any, parts: str | None, workers: int) -> int:
    """Number of images that could not be converted."""
    from pipelines.packed.conversion import convert
    from pipelines.packed.gathering import gather

    wanted: Any = None if parts is None else tuple(part.strip() for part in parts.split(","))
    if wanted is not None and (not set(wanted) <= {"train", "test"} or len(set(wanted)) != len(wanted)):
        raise _misuse(f"--parts {parts}: expected train, test or train,test")
    source, remarks = gather(config, wanted)
    for remark in remarks:
        console.print(_printable(remark))
    start = time.perf_counter()
    with _progress() as bar:
        task = bar.add_task("converting", total=sum(len(part.index) for part in source.parts))

        def planned(estimate: Estimate) -> None:
            resumed = f", {estimate.written / 1e9:.3g} GB of it written earlier" if estimate.written else ""
            console.print(
                f"{estimate.images:,} images, about {estimate.bytes / 1e9:.3g} GB{resumed}; "
                f"{estimate.free / 1e9:,.0f} GB are free"
            )

        def progress(images: int) -> None:
            bar.advance(task, images)

        try:
            result = convert(source, destination, options, workers=workers, planned=planned, progress=progress)
        except KeyboardInterrupt:
            console.print("stopped; the same command continues where this one stopped")
            raise typer.Exit(130) from None
    if result.already_done:
        console.print(f"{destination}: already done")
    else:
        console.print(f"finished in {time.perf_counter() - start:,.1f} s")
    return _report(result.manifest, destination)


def _report(manifest: Manifest, destination: Path) -> int:
    from pipelines.packed.finishing import SKIPPED

    table = Table(title=f"{destination}: {manifest.source} as {manifest.to}")
    for heading in ("part", "images", "kept", "encoded", "lossless", "left out", "files", "MB", "height", "width"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, part in manifest.parts.items():
        size = sum(shard.bytes for shard in part.shards) / 1e6
        sides = [f"{side.min}-{side.max} ({side.median:g})" for side in (part.height, part.width)]
        numbers = (part.count, part.kept, part.encoded, part.raw, part.skipped, len(part.shards), round(size, 1))
        table.add_row(name, *(f"{number:,}" for number in numbers), *sides)
    console.print(table)
    listed = (destination / SKIPPED).read_text(encoding="utf-8").splitlines()
    skipped = sum(part.skipped for part in manifest.parts.values())
    if skipped:
        console.print(f"{skipped:,} images could not be converted; {destination / SKIPPED} says which and why:")
        for line in listed[:5]:
            console.print(f"  {line}")
    if len(listed) > skipped:
        console.print(f"{len(listed) - skipped:,} other files lay among the images; {destination / SKIPPED} lists them")
    return skipped


def _verify(place: str, workers: int) -> int:
    from pipelines.packed.verify import verify

    with _progress() as bar:
        task = bar.add_task("verifying", total=None)
        found = verify(place, workers=workers, progress=lambda images: bar.advance(task, images))
    table = Table(title=f"{place}: verified")
    for heading in ("part", "images", "files", "MB", "defects"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for one in found:
        table.add_row(one.name, f"{one.images:,}", f"{one.files:,}", f"{one.bytes / 1e6:,.1f}", f"{len(one.defects):,}")
    console.print(table)
    defects = [defect for one in found for defect in one.defects]
    for defect in defects[:_SHOWN]:
        console.print(f"  {_printable(defect)}")
    if len(defects) > _SHOWN:
        console.print(f"  and {len(defects) - _SHOWN:,} more")
    return 1 if defects else 0


def _config(source: str, root: Path | None, pairs: list[str]) -> DataConfig:
    from pydantic import ValidationError

    from pipelines.foreign import load_yaml
    from pipelines.packed.files import is_url
    from pipelines.packed.manifest import read_manifest
    from pipelines.sources import SETS, DataConfig, DataError

    settings: dict[str, Any] = {}
    if source in SETS:
        settings = {"source": source, "root": root}
    elif root is not None:
        raise _misuse(f"--root is for a source given by name, and {source!r} is not one of {', '.join(SETS)}")
    elif is_url(source) or os.path.isdir(source):
        manifest = read_manifest(source)
        if manifest is None and is_url(source):
            raise DataError(f"{source}: no packed set there; a URL must lead to a folder that this tool made")
        settings = {"source": "folder" if manifest is None else manifest.source}
        settings |= {"url": source} if is_url(source) else {"root": Path(source)}
    else:
        raise _misuse(f"{source!r} is neither a folder nor a data source; the sources are {', '.join(SETS)}")
    for pair in pairs:
        key, equals, value = pair.partition("=")
        name = key.removeprefix("data.")
        if not equals or name not in _OVERRIDES or name == key:
            takes = ", ".join(f"data.{name}=..." for name in _OVERRIDES)
            raise _misuse(f"{pair!r}: expected one of {takes}; what a run selects of a set is set in its recipe")
        try:
            settings[name] = load_yaml(value)
        except yaml.YAMLError as error:
            raise _misuse(f"{pair!r}: the value is not YAML: {error}") from None
    try:
        return DataConfig(**settings)
    except ValidationError as error:
        raise _misuse("; ".join(problem["msg"] for problem in error.errors())) from None


def _seed(shuffle: str | None) -> int | None:
    if shuffle == "none":
        return None
    try:
        seed = int(shuffle or 0)
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**32:
        raise _misuse(f"--shuffle {shuffle}: expected none, or a seed from 0 to {2**32 - 1}")
    return seed


def _misuse(message: str) -> Exception:
    from pipelines.stored.images import DataError

    return DataError(message)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """What a user can mend ends in one line and exit code 2."""
    from pipelines.packed.pool import WorkerError
    from pipelines.stored.images import DataError

    try:
        yield
    except (DataError, WorkerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def _printable(text: str) -> str:
    """With control characters, and names that are not UTF-8, as escapes: a terminal cannot show them."""
    from pipelines.foreign import printable

    return printable(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.0f} images/s")


if __name__ == "__main__":
    app()
