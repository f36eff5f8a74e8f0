"""Which images carry labels: seeded, stratified subsets, and the files that fix them.

A budget is "all", a percentage ("1%", "10%") or a count a class ("4-per-class"). With one seed every class is
shuffled once and read from its front, so a budget that gives each class more contains one that gives it less.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipelines.foreign import load_json, read_text
from pipelines.stored.images import DataError, FileImages

if TYPE_CHECKING:
    from pipelines.sources import Source


def label_subset(source: Source, budget: str, seed: int = 0) -> Tensor:
    """Positions in `source` of the images whose labels may be used.

    Drawn without replacement. A percentage is shared out in proportion to the classes by largest remainder,
    at least one image a class that has any; "N-per-class" takes exactly N of each class in `source.classes`.

    Args:
        source: a split with one known label an image.
        budget: "all", "P%" with 0 < P <= 100, or "N-per-class" with N >= 1.
        seed: any 32-bit unsigned integer.

    Returns:
        int64 [n], ascending.

    Raises:
        DataError: a budget of another form; a multi-label source or one with unlabelled images; more images a
            class than there are.
    """
    if budget == "all":
        return torch.arange(len(source))
    percentage = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", budget.strip())
    each = re.fullmatch(r"(\d+)-per-class", budget.strip())
    if percentage is None and each is None:
        raise DataError(f"label budget {budget!r}: expected 'all', a percentage such as '10%', or 'N-per-class'")

    where = f"label budget {budget!r} of {source.name}/{source.split}"
    if source.multi_label:
        raise DataError(f"{where}: its images carry several labels each, so they cannot be stratified; use 'all'")
    labels = source.labels.numpy()
    unknown = int((labels < 0).sum())
    if unknown:
        raise DataError(
            f"{where}: {unknown:,} of {len(labels):,} images have no label; "
            "draw from the 'train' split of a labelled set"
        )

    counts = np.bincount(labels, minlength=source.num_classes)
    if each is not None:
        wanted = int(each.group(1))
        short = [f"{source.classes[c]!r} ({counts[c]})" for c in np.flatnonzero(counts < wanted)]
        if wanted < 1 or short:
            problem = f"too few images of {', '.join(short[:5])}" if short else "expected at least 1"
            more = f" and {len(short) - 5} more classes" if len(short) > 5 else ""
            raise DataError(f"{where}: {problem}{more}; ask for fewer images a class")
        take = np.full(len(counts), wanted)
        return torch.from_numpy(draw(labels, take, seed))

    assert percentage is not None
    share = float(percentage.group(1)) / 100
    if not 0 < share <= 1:
        raise DataError(f"label budget {budget!r}: expected a percentage above 0 and at most 100")
    return torch.from_numpy(stratified_draw(labels, round_half_up(len(labels) * share), seed, at_least=1))


def save_subset(path: Path, source: Source, positions: Tensor, *, budget: str, seed: int) -> None:
    """Write the subset as a small JSON file, readable on any machine that has the same set.

    `positions` [n] point into `source`; the file holds `source.ids[positions]`, so it stays valid under
    another hold-out or limit as long as the images are still there.
    """
    chosen = source.select(positions)
    record = {
        "source": source.name,
        "split": source.split,
        "budget": budget,
        "seed": seed,
        "content": _content(chosen),
        "ids": chosen.ids.tolist(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(json.dumps(record) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def load_subset(path: Path, source: Source) -> Tensor:
    """Positions in `source` of a subset kept in a file: int64 [n], in the file's order.

    `.json` is what `save_subset` wrote; `.txt` names one image a line (`listed_subset`).

    Raises:
        DataError: the file is missing or malformed, was drawn from another source or split, names images that
            this source does not hold, or names images or labels that have changed since.
    """
    if path.suffix == ".txt":
        return listed_subset(path, source)
    try:
        record = load_json(read_text(path))
        name, split, content = record["source"], record["split"], record["content"]
        ids = torch.tensor(record["ids"], dtype=torch.int64)
        if ids.ndim != 1:
            raise ValueError("ids is not a list of numbers")
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot read the label subset {path}: {reason}; write one with save_subset") from error
    if (name, split) != (source.name, source.split):
        raise DataError(
            f"label subset {path} was drawn from {name}/{split}, not from {source.name}/{source.split}; "
            "load it with the source it was drawn from"
        )

    order = torch.argsort(source.ids)
    slots = torch.searchsorted(source.ids[order], ids).clamp(max=max(len(order) - 1, 0))
    found = source.ids[order[slots]] == ids if len(order) else torch.zeros_like(ids, dtype=torch.bool)
    if not bool(found.all()):
        absent = ids[~found]
        raise DataError(
            f"label subset {path} names {len(absent):,} images that {source.name}/{source.split} does not "
            f"hold (stored position {int(absent[0])}, for one); open the source with the data.holdout, "
            "data.holdout_seed and data.limit it was drawn with"
        )
    positions = order[slots]
    if _content(source.select(positions)) != content:
        raise DataError(
            f"label subset {path} does not fit {source.name}/{source.split}: the images or labels at its "
            "positions are not those it was drawn from; draw the subset again"
        )
    return positions


def listed_subset(path: Path, source: Source) -> Tensor:
    """Positions in `source` of the images that a text file names, one a line: int64 [n], in the file's order.

    As the 1 % and 10 % of ImageNet are published (SimCLR, arXiv:2002.05709: `n01440764_10026.JPEG`). A name with
    a slash is a path below the training folder.

    Raises:
        DataError: the file cannot be read, names nothing, an image twice, or one that is not there or is there
            several times; or the source does not consist of files with names.
    """
    images = source.images
    if not isinstance(images, FileImages):
        raise DataError(
            f"label list {path} names files, and {source.name} does not keep its images in files of their own; "
            "use the original files, or an index file (.json)"
        )
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the label list {path}: {error}; expected one image name a line") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise DataError(f"label list {path} is empty; expected one image name a line")

    places: dict[str, list[int]] = {}
    for place, stored in enumerate(images.names.tolist()):
        below = os.fsdecode(stored)
        for known in {below, os.path.basename(below)}:
            places.setdefault(known, []).append(place)
    where = f"{source.name}/{source.split} ({len(source):,} images below {images.root})"
    if absent := [name for name in names if name not in places]:
        raise DataError(f"label list {path} names {len(absent):,} images that are not in {where}: {_first(absent)}")
    if unclear := [name for name in names if len(places[name]) > 1]:
        raise DataError(
            f"label list {path}: {len(unclear):,} names are those of several images in {where}: {_first(unclear)}; "
            "write them as class/name"
        )
    positions = [places[name][0] for name in names]
    times = Counter(positions)
    if twice := [name for name, place in zip(names, positions, strict=True) if times[place] > 1]:
        raise DataError(f"label list {path} names images more than once: {_first(twice)}")
    return torch.tensor(positions, dtype=torch.int64)


def _first(names: Iterable[str]) -> str:
    shown = list(dict.fromkeys(names))
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")


def _content(chosen: Source) -> str:
    """Hash of a subset's images and labels. File dates are left out: they differ from machine to machine."""
    digest = hashlib.blake2b(digest_size=16)
    chosen.images.feed(digest, times=False)
    digest.update(chosen.labels.numpy().tobytes())
    return digest.hexdigest()


# Drawing, for every split, limit and subset of the pipelines.


def stratified_draw(labels: np.ndarray, total: int, seed: int, *, at_least: int = 0, leave: int = 0) -> np.ndarray:
    """Positions, ascending, of `total` rows of `labels`, shared out over its values by largest remainder.

    Args:
        labels: int64 [N]; every value is a stratum of its own.
        total: how many rows; exact wherever the two bounds allow it.
        at_least: rows that every stratum gives, as far as it has them.
        leave: rows that every stratum keeps.
    """
    counts = np.bincount(np.unique(labels, return_inverse=True)[1])
    return draw(labels, _largest_remainder(counts, total, np.minimum(at_least, counts), counts - leave), seed)


def draw(labels: np.ndarray, take: np.ndarray, seed: int) -> np.ndarray:
    """Positions, ascending, of `take[c]` random rows of the c-th smallest value of `labels`."""
    if not len(labels):
        return np.empty(0, dtype=np.int64)
    # RandomState's stream is frozen by NumPy's policy, unlike that of its Generators: a split must outlive
    # upgrades.
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    grouped = shuffled[np.argsort(labels[shuffled], kind="stable")]
    groups = np.split(grouped, np.cumsum(np.unique(labels, return_counts=True)[1])[:-1])
    return np.sort(np.concatenate([group[:n] for group, n in zip(groups, take, strict=True)]))


def round_half_up(value: float) -> int:
    return int(value + 0.5)


def _largest_remainder(counts: np.ndarray, total: int, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Shares of `total` in proportion to `counts`, whole numbers within [low, high]."""
    high = np.maximum(high, 0)
    low = np.minimum(low, high)
    total = int(np.clip(total, low.sum(), high.sum()))
    if not len(counts):
        return counts
    shares, remainders = np.divmod(counts.astype(np.int64) * total, counts.sum())
    shares = np.clip(shares, low, high)
    # The largest remainders are served first; only where the bounds bite does this take more than one round.
    order = np.argsort(-remainders, kind="stable")
    while (missing := total - int(shares.sum())) != 0:
        step = 1 if missing > 0 else -1
        queue = order if step > 0 else order[::-1]
        free = queue[(shares < high)[queue] if step > 0 else (shares > low)[queue]]
        shares[free[: abs(missing)]] += step
    return shares
