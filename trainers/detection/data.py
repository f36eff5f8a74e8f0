"""Images with boxes, from trees in VOC's format (XML) and in COCO's (JSON)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.foreign import load_json, read_bytes, read_text
from pipelines.sources import DataError
from pipelines.stored.encoded import check_scans, open_image
from pipelines.stored.trees import MOST_ANNOTATION, check_inside

Target = dict[str, Tensor]
MOST_ANNOTATIONS = 1 << 31  # bytes; COCO's training images have 0.45 GB of them


@dataclass(frozen=True, slots=True)
class Objects:
    """The objects of one image."""

    image: Path
    boxes: Tensor  # [n, 4] float32: left, top, right, bottom, in pixels from the image's corner
    labels: Tensor  # [n] int64 from 1 on; 0 is the background
    ignored: Tensor  # [n] bool: VOC's difficult, COCO's crowds; neither trained on nor counted

    def target(self) -> Target:
        """As torchmetrics takes it."""
        return {"boxes": self.boxes, "labels": self.labels, "iscrowd": self.ignored.long()}


@dataclass(frozen=True, slots=True)
class DetectionSet:
    images: list[Objects]
    classes: tuple[str, ...]  # of the labels 1, 2, …

    def trainable(self) -> DetectionSet:
        """Without what is ignored, and without images where nothing else is."""
        kept = [
            Objects(one.image, one.boxes[~one.ignored], one.labels[~one.ignored], one.ignored[~one.ignored])
            for one in self.images
            if not one.ignored.all()
        ]
        return DetectionSet(kept, self.classes)


def read_voc(root: Path, parts: Sequence[str], classes: tuple[str, ...] | None = None) -> DetectionSet:
    """Parts such as "VOC2007/trainval": ``VOC2007/ImageSets/Main/trainval.txt``, ``Annotations/``, ``JPEGImages/``.

    VOC counts pixels from 1 and includes the last, so 1 is taken from left and top.

    Args:
        root: where the folders of the years lie, VOCdevkit as a rule.
        parts: folder/list.
        classes: in order; None for the names that occur, sorted.

    Raises:
        DataError: a file is missing or damaged, or an object's class is not among ``classes``.
    """
    found: list[tuple[Path, Path, list[tuple[str, list[float], bool]]]] = []
    for part in parts:
        folder, _, name = part.rpartition("/")
        listing = root / folder / "ImageSets" / "Main" / f"{name}.txt"
        try:
            stems = read_text(listing).split()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"detect: cannot read {listing}: {error}; parts are named like VOC2007/trainval") from error
        check_inside("detect", listing, stems)
        for stem in stems:
            annotation = root / folder / "Annotations" / f"{stem}.xml"
            found.append((root / folder / "JPEGImages" / f"{stem}.jpg", annotation, _voc_objects(annotation)))
    if classes is None:
        classes = tuple(sorted({name for _, _, objects in found for name, _, _ in objects}))
    images = []
    for image, annotation, objects in found:
        strange = sorted({name for name, _, _ in objects} - set(classes))
        if strange:
            raise DataError(f"detect: {annotation} has the class {strange[0]!r}, which the training images do not have")
        rows = [(classes.index(name) + 1, box, difficult) for name, box, difficult in objects]
        images.append(_objects(image, rows, str(annotation)))
    return _nonempty(DetectionSet(images, classes), ", ".join(parts))


def _voc_objects(path: Path) -> list[tuple[str, list[float], bool]]:
    objects = []
    try:
        for item in ElementTree.fromstring(read_bytes(path, MOST_ANNOTATION)).findall("object"):
            name = (item.findtext("name") or "").strip()
            left, top, right, bottom = (
                float(item.findtext(f"bndbox/{side}") or "missing") for side in ("xmin", "ymin", "xmax", "ymax")
            )
            difficult = (item.findtext("difficult") or "0").strip() == "1"
            objects.append((name, [left - 1, top - 1, right, bottom], difficult))
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"detect: cannot read the annotation {path}: {error}") from error
    return objects


def read_coco(root: Path, parts: Sequence[str], classes: tuple[str, ...] | None = None) -> DetectionSet:
    """Parts such as "train2017": ``annotations/instances_train2017.json`` and the folder ``train2017/``.

    Labels count the categories in the order of their ids. Raises DataError as ``read_voc`` does.
    """
    images = []
    for part in parts:
        path = root / "annotations" / f"instances_{part}.json"
        try:
            content = load_json(read_text(path, MOST_ANNOTATIONS))
            categories = sorted((row["id"], row["name"]) for row in content["categories"])
            label_of = {number: label for label, (number, _) in enumerate(categories, start=1)}
            by_image: dict[Any, list[tuple[int, list[float], bool]]] = {row["id"]: [] for row in content["images"]}
            for row in content["annotations"]:
                left, top, width, height = (float(value) for value in row["bbox"])
                box = [left, top, left + width, top + height]
                if width > 0 and height > 0:  # COCO has a few boxes without an area
                    by_image[row["image_id"]].append((label_of[row["category_id"]], box, bool(row.get("iscrowd", 0))))
            files = {row["id"]: root / part / row["file_name"] for row in content["images"]}
            check_inside("detect", path, [row["file_name"] for row in content["images"]])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"detect: cannot read {path}: {reason}; parts are named like train2017") from error
        names = tuple(name for _, name in categories)
        if classes is not None and names != classes:
            raise DataError(f"detect: {path} has other categories than the training images: {len(names)} of them")
        classes = names
        images += [_objects(files[number], rows, str(path)) for number, rows in by_image.items()]
    return _nonempty(DetectionSet(images, classes or ()), ", ".join(parts))


def _objects(image: Path, rows: Iterable[tuple[int, list[float], bool]], where: str) -> Objects:
    """From (label, box, ignored)."""
    listed = list(rows)
    if not image.is_file():  # found out now, not after a night of training
        raise DataError(f"detect: {where} belongs to the image {image}, which is not there")
    boxes = torch.tensor([box for _, box, _ in listed], dtype=torch.float32).reshape(-1, 4)
    if len(boxes) and not ((boxes[:, 2:] > boxes[:, :2]).all() and boxes.isfinite().all()):
        raise DataError(f"detect: {where} has a box without an area, for the image {image.name}")
    labels = torch.tensor([label for label, _, _ in listed], dtype=torch.int64)
    return Objects(image, boxes, labels, torch.tensor([ignored for _, _, ignored in listed], dtype=torch.bool))


def _nonempty(found: DetectionSet, parts: str) -> DetectionSet:
    if all(one.ignored.all() for one in found.images):
        raise DataError(f"detect: {parts}: no image has an object to find")
    return found


def load_image(path: Path) -> Tensor:
    """[3, H, W] float32 in [0, 1], as stored: annotations are of the pixels, not of an EXIF orientation."""
    try:
        with open_image(path) as image:
            check_scans(image)
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, …
        raise DataError(f"detect: cannot decode the image file {path}: {error}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


class TrainingImages(Dataset[tuple[Tensor, Target]]):
    """Items by (row, flip): what is random is drawn by the sampler, so workers do not matter."""

    def __init__(self, images: list[Objects]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, drawn: tuple[int, bool]) -> tuple[Tensor, Target]:
        row, flip = drawn
        one = self.images[row]
        image, boxes = load_image(one.image), one.boxes
        if flip:
            image, width = image.flip(-1), image.shape[-1]
            boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
        return image, {"boxes": boxes, "labels": one.labels}


def training_batches(count: int, batch_size: int, iterations: int, seed: int) -> Iterator[list[tuple[int, bool]]]:
    """Batches of (row, flip): all rows in a new order again and again, each flipped with probability 1/2."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    for _ in range(iterations):
        while len(waiting) < batch_size:
            waiting += torch.randperm(count, generator=generator).tolist()
        rows, waiting = waiting[:batch_size], waiting[batch_size:]
        flips = (torch.rand(batch_size, generator=generator) < 0.5).tolist()
        yield list(zip(rows, flips, strict=True))
