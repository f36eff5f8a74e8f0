"""What a packed set says of itself: `manifest.json`, written last, so that a folder with one is complete."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from pipelines.config import Section
from pipelines.packed.encode import Format
from pipelines.packed.files import exists, find_file, is_url, join, read_at
from pipelines.stored.images import DataError

NAME = "manifest.json"
RGB = tuple[float, float, float]
Deviation = Annotated[float, Field(gt=1e-6, le=1)]  # pixels are divided by it
MOST_BYTES = 1 << 28  # of a manifest; a shard takes 200
_MARK = b'"twinstream-packed"'


class Shard(Section):
    """One file of images."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+$")  # in this folder, whatever a stranger writes here
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str


class Range(Section):
    """Of the sides of the stored images, pixels."""

    min: int
    median: float
    max: int


class Part(Section):
    """The training images (with the unlabelled ones, where a set has them), or the test images."""

    count: int = Field(ge=1)
    skipped: int = Field(ge=0)  # images of the source that could not be packed; skipped.jsonl names them
    shards: tuple[Shard, ...] = Field(min_length=1)
    height: Range
    width: Range
    kept: int  # JPEGs stored as they were
    encoded: int  # encoded anew
    raw: int  # stored without loss
    mean: RGB  # of the stored pixels, in [0, 1], every image alike
    std: RGB
    class_counts: tuple[int, ...] | None  # of the source, the skipped ones included; None: multi-label or no classes


class Statistics(Section):
    """What the source measured of itself where no paper says: the same after packing."""

    mean: RGB
    std: tuple[Deviation, Deviation, Deviation]
    image_size: int = Field(ge=1, le=65_535)


class Manifest(Section):
    """All that is known of a packed set besides its images."""

    format: Literal["twinstream-packed"] = "twinstream-packed"
    version: Literal[1] = 1
    source: str
    classes: tuple[str, ...]
    options: dict[str, Any]
    chosen: bool = False  # by data.class_list: the source has more classes
    fingerprint: str  # of the source's labels and files
    statistics: Statistics | None
    parts: dict[Literal["train", "test"], Part]

    @property
    def to(self) -> Format:
        return self.options["to"]

    def dumps(self) -> str:
        content = self.model_dump(mode="json")
        return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of a packed folder (a path or URL); None where `folder` is not one.

    Raises:
        DataError: there is one, and it is damaged, or its server cannot send parts of files.
    """
    place = join(folder, NAME)
    if not exists(place):
        return None
    file = find_file(place)
    data = read_at(file, 0, min(file.size, MOST_BYTES))
    if _MARK not in data:
        return None  # somebody else's file, in a folder of images
    if is_url(folder):
        read_at(file, 0, 1)  # tells on this small file whether the server knows ranges
    try:
        if file.size > MOST_BYTES:
            raise ValueError(f"it has {file.size:,} bytes, more than {MOST_BYTES:,}")
        content = json.loads(data)
        checksum = content.pop("checksum", None)
        manifest = Manifest.model_validate_json(json.dumps(content))
        if checksum is None:
            raise ValueError("it has no checksum: it was edited, or made before there was one")
        if checksum != _checksum(content):
            raise ValueError("its checksum is not that of its content: it was edited or damaged")
        for name, part in manifest.parts.items():
            if part.class_counts is not None and len(part.class_counts) != len(manifest.classes):
                raise ValueError(f"parts.{name} counts {len(part.class_counts)} of {len(manifest.classes)} classes")
        if manifest.options.get("to") not in ("ffcv", "webdataset", "tfrecord"):
            raise ValueError(f"packed as {manifest.options.get('to')!r}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{place}: {where}: {first['msg']}; convert the set again") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{place}: not a manifest that this version reads: {error}; convert the set again") from error
    return manifest


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of the content, whatever the order of the keys and the spaces."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
