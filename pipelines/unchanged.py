"""Whether the stored images are still those that a run began with: by names, sizes and dates, never by reading all."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

from pipelines.packed.files import find_file, is_url
from pipelines.packed.images import PackedImages
from pipelines.sources import ArrayImages, FileImages, Source
from pipelines.stored.images import DataError, Images

_MOST_FILES = 100_000  # beyond that, asking for the size of each takes minutes on a network's disk
_ROWS = 1024  # images that stand for an array


def check_unchanged(images: Images) -> None:
    """Called at the beginning of an epoch; single image files are checked as they are read.

    Raises:
        DataError: a packed file is gone, or is another or of another size or date than when it was opened.
    """
    if not isinstance(images, PackedImages):
        return
    for file in images.files:
        if not is_url(file.place) and find_file(file.place) != file:
            raise DataError(
                f"{file.place} was changed or replaced since the run began; put the old file back and run the same"
                " command again"
            )


@lru_cache(maxsize=4)
def data_fingerprint(source: Source) -> str:
    """What a checkpoint says of its images, for `is_other_data`: the kind of storage and a hash.

    The hash is over names and sizes of files (of more than 100,000 names alone) and the places of images in packed
    ones, or over 1,024 images of an array. Dates are left out: a copy on another machine is the same set.
    """
    images, digest = source.images, hashlib.blake2b(digest_size=8)
    kind = images.kind if isinstance(images, PackedImages) else type(images).__name__
    if isinstance(images, ArrayImages):
        images.select(np.linspace(0, len(images) - 1, min(len(images), _ROWS)).astype(np.int64)).feed(digest)
    elif isinstance(images, FileImages) and len(images) > _MOST_FILES:
        digest.update(images.names.tobytes())
    else:
        images.feed(digest, times=False)
    return f"{kind} {len(images)} {digest.hexdigest()}"


def is_other_data(before: str | None, now: str | None) -> bool:
    """Whether two fingerprints are of different images; of two kinds of storage, or of none, nothing can be said."""
    if before is None or now is None:  # a checkpoint from before it was noted
        return False
    return before != now and before.split()[0] == now.split()[0]
