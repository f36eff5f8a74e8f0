"""What a worker process of a verification does: images decoded and compared with their table. Imports no torch."""

from __future__ import annotations

import numpy as np

from pipelines.packed.encode import BadImage, decode_checked
from pipelines.packed.images import PackedImages
from pipelines.packed.pool import Channel
from pipelines.stored.images import DataError


def check_images(images: PackedImages, channel: Channel) -> list[tuple[int, str]]:
    """(position, defect) of each image that is not what the table says, or does not decode without complaint."""
    defects = []
    for row in range(len(images)):
        try:
            wrong = _wrong(images, row)
        except (BadImage, DataError) as error:
            wrong = str(error)
        if wrong is not None:
            defects.append((int(images.table.index[row]), f"{images.where(row)}: {wrong}"))
    channel.progress(len(images))
    return defects


def _wrong(images: PackedImages, row: int) -> str | None:
    stored = images.read(row)
    if isinstance(stored, np.ndarray) and stored.ndim == 3:
        return None  # its length was compared with its height and width
    header, pixels = decode_checked(stored)
    height, width = int(images.table.height[row]), int(images.table.width[row])
    if pixels.shape[:2] != (height, width):
        return f"has {pixels.shape[0]} x {pixels.shape[1]} pixels, and {height} x {width} by the table"
    if images.kind == "ffcv" and (not header.plain_jpeg or header.orientation != 1):
        return f"is a {header.format} in mode {header.mode}, orientation {header.orientation}; FFCV reads upright JPEGs"
    return None
