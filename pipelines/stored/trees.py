"""Sets that are trees of image files: folders, ImageNet and its subsets, tiny-imagenet, VOC 2007.

A reader lists the files of a stored part and reads their labels; no image is decoded here.
"""

from __future__ import annotations

import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipelines.foreign import read_bytes, read_text
from pipelines.stored.common import Part, Stored, download_or, missing, through_torchvision
from pipelines.stored.images import EXTENSIONS, DataError, FileImages
from pipelines.stored.listing import class_names, image_names, left_out

if TYPE_CHECKING:
    from pipelines.sources import DataConfig


def read_folder(config: DataConfig, part: Part) -> Stored:
    layout = "train/<class>/ and val/<class>/ or test/<class>/, or <class>/ alone, or images alone (unlabelled)"
    how = "set data.root to the folder that holds your images"
    root = config.root.expanduser() if config.root is not None else None
    if root is None:
        raise DataError(f"folder: data.root is not set; expected a folder with {layout}; {how}")
    if not root.is_dir():
        raise missing("folder", root, layout, how)
    apart = [name for name in ("test", "val") if (root / name).is_dir()]
    if apart and not (root / "train").is_dir():  # or else they would be taken for classes
        raise DataError(f"folder: {root} has {' and '.join(apart)}/ but no train/; expected {layout}")
    train = root / "train" if (root / "train").is_dir() else root
    if part != "test":
        return _class_tree("folder", train, layout)
    if not apart:
        raise DataError(
            f"folder: {root} has no test images: no train/ with test/ or val/ beside it; "
            "everything there is training data. Use the 'holdout' split, or add one of these folders"
        )
    return _class_tree("folder", root / apart[0], layout, classes=class_names(train))


def read_imagenet(config: DataConfig, part: Part, *, subset: int | None = None) -> Stored:
    layout = "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG"
    how = (
        "get ILSVRC2012 from https://www.image-net.org (with an account, so data.download cannot), "
        "and sort the validation images into a folder a class"
    )
    root = _find(config.folder, ("", "imagenet"), "train")
    if root is None:
        raise missing(config.source, config.folder, layout, how)
    wanted = imagenet_classes(config, root, subset)
    classes = class_names(root / "train") if wanted is None else wanted
    folder = root / ("val" if part == "test" else "train")
    if not folder.is_dir() or not class_names(folder):
        raise missing(config.source, folder, "a folder a class (<wnid>/*.JPEG)", how)
    return _class_tree(config.source, folder, layout, classes=classes, all_classes=False)


def imagenet_classes(config: DataConfig, root: Path, subset: int | None) -> tuple[str, ...] | None:
    """The classes of imagenet50/100/200, or of data.class_list; None: all."""
    if subset is not None:
        return read_class_list(_subset_list(config.folder, root, subset))
    return None if config.class_list is None else read_class_list(config.class_list.expanduser())


def _subset_list(folder: Path, root: Path, subset: int) -> Path:
    name = f"imagenet{subset}.txt"
    places = [folder / name, root / name, Path(__file__).parents[1] / "lists" / name]
    for place in places:
        if place.is_file():
            return place
    raise DataError(
        f"imagenet{subset}: its list of classes is not at {places[0]}; get "
        f"data/imagenet_subsets/imagenet_{subset}.txt from "
        "https://github.com/wvangansbeke/Unsupervised-Classification and put it there"
    )


def read_class_list(path: Path) -> tuple[str, ...]:
    """Class folders named by a text file: the first word of each line; lines starting with # are left out."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the class list {path}: {error}; expected one wnid a line") from error
    wnids = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    twice = [wnid for wnid, times in Counter(wnids).items() if times > 1]
    if not wnids or twice:
        raise DataError(f"class list {path}: {'is empty' if not wnids else 'names twice: ' + ', '.join(twice[:5])}")
    return tuple(wnids)


def read_tiny_imagenet(config: DataConfig, part: Part) -> Stored:
    layout = "train/<wnid>/images/*.JPEG and val/images/*.JPEG with val/val_annotations.txt, or val/<wnid>/"
    how = "unpack tiny-imagenet-200.zip from https://cs231n.stanford.edu/tiny-imagenet-200.zip there by hand"
    root = _find(config.folder, ("", "tiny-imagenet-200"), "train")
    if root is None:
        raise missing("tiny_imagenet", config.folder, layout, how)
    if part != "test":
        return _class_tree("tiny_imagenet", root / "train", layout)
    classes, annotations = class_names(root / "train"), root / "val" / "val_annotations.txt"
    if not (root / "val" / "images").is_dir():  # re-arranged into class folders
        if not (root / "val").is_dir():
            raise missing("tiny_imagenet", root / "val", layout, how)
        return _class_tree("tiny_imagenet", root / "val", layout, classes=classes)
    if not annotations.is_file():
        raise missing("tiny_imagenet", root / "val", layout, how)
    lines = _listing("tiny_imagenet", annotations).splitlines()
    pairs = sorted((name, wnid) for name, wnid, *_ in (line.split("\t") for line in lines if "\t" in line))
    check_inside("tiny_imagenet", annotations, [name for name, _ in pairs])
    unknown = sorted({wnid for _, wnid in pairs} - set(classes))
    if unknown:
        raise DataError(
            f"tiny_imagenet: {annotations} names classes without a folder in {root / 'train'}: {unknown[:5]}"
        )
    labels = torch.tensor([classes.index(wnid) for _, wnid in pairs], dtype=torch.int64)
    return Stored(FileImages(root / "val" / "images", [name for name, _ in pairs]), labels, classes)


MOST_ANNOTATION = 1 << 24  # bytes of an image's XML

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# fmt: on


def read_voc07(config: DataConfig, part: Part) -> Stored:
    from torchvision.datasets import VOCDetection

    image_set = "test" if part == "test" else "trainval"
    layout = "VOCdevkit/VOC2007/ with JPEGImages/, Annotations/ and ImageSets/Main/{trainval,test}.txt"
    page = (
        "VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar from http://host.robots.ox.ac.uk/pascal/VOC/voc2007/"
    )
    marker, places = f"ImageSets/Main/{image_set}.txt", ("VOCdevkit/VOC2007", "VOC2007", "")
    root = _find(config.folder, places, marker)
    if root is None and config.download:
        fetch = partial(VOCDetection, config.folder, year="2007", image_set=image_set, download=True)
        through_torchvision(config, fetch, "voc07", layout, page)
        root = _find(config.folder, places, marker)
    if root is None:
        raise missing("voc07", config.folder, layout, download_or(page))
    stems = _listing("voc07", root / marker).split()
    if not stems:
        raise DataError(f"voc07: {root / marker} is empty; expected one image name a line")
    check_inside("voc07", root / marker, stems)
    labels = np.stack([_voc_labels(root / "Annotations" / f"{stem}.xml") for stem in stems])
    names = [f"{stem}.jpg" for stem in stems]
    return Stored(FileImages(root / "JPEGImages", names), torch.from_numpy(labels), VOC_CLASSES)


def _voc_labels(path: Path) -> np.ndarray:
    """[20] float32: 1 where the class is there, -1 where it is only there as 'difficult', 0 elsewhere."""
    labels = np.zeros(len(VOC_CLASSES), dtype=np.float32)
    try:
        for item in ElementTree.fromstring(read_bytes(path, MOST_ANNOTATION)).iter("object"):
            name = (item.findtext("name") or "").strip()
            if name not in VOC_CLASSES:
                raise ValueError(f"unknown class {name!r}")
            column = VOC_CLASSES.index(name)
            if (item.findtext("difficult") or "0").strip() != "1":
                labels[column] = 1
            elif labels[column] == 0:
                labels[column] = -1
    except (OSError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise DataError(f"voc07: cannot read the annotation {path}: {error}; unpack the archives again") from error
    return labels


def _class_tree(
    name: str, folder: Path, layout: str, *, classes: Sequence[str] | None = None, all_classes: bool = True
) -> Stored:
    """The images below `folder`, one class a sub-folder, in the order of the classes and then of the paths.

    Args:
        classes: the class folders, in order; None for those that are there.
        all_classes: whether a sub-folder outside `classes` is an error.
    """
    present = class_names(folder)
    if classes is None:
        classes = present
    if not classes:  # images without classes
        names = image_names(folder, "")
        if not names:
            raise missing(name, folder, layout, f"images end in {' '.join(EXTENSIONS)}")
        return Stored(FileImages(folder, names), torch.full((len(names),), -1), (), left_out=partial(left_out, folder))
    unknown = sorted(set(present) - set(classes)) if all_classes else []
    if unknown:
        raise DataError(f"{name}: {folder} has class folders that the training images do not have: {_some(unknown)}")

    there = set(present)
    by_class = [image_names(folder, wanted) if wanted in there else [] for wanted in classes]
    empty = [wanted for wanted, found in zip(classes, by_class, strict=True) if not found]
    if empty:
        report = f"{name}: {folder} has no images of {len(empty)} of {len(classes)} classes: {_some(empty)}"
        if folder.name not in ("test", "val") or len(empty) == len(classes):
            raise DataError(f"{report}; add images ({' '.join(EXTENSIONS)}) or remove the classes")
        warnings.warn(report, stacklevel=2)  # a test set may lack a class
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(found) for found in by_class]))
    names = [path for found in by_class for path in found]
    return Stored(FileImages(folder, names), labels, tuple(classes), left_out=partial(left_out, folder, classes))


def _listing(name: str, path: Path) -> str:
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: cannot read {path}: {error}; unpack the archives again") from error


def check_inside(name: str, listing: Path, names: Sequence[str]) -> None:
    """Refuse names in a listing that would lead out of the folder of the images."""
    for one in names:
        if one.startswith("/") or ".." in one.split("/") or "\0" in one or not one:
            raise DataError(f"{name}: {listing} names {one!r}, which is not in the folder of its images")


def _find(folder: Path, places: Sequence[str], marker: str) -> Path | None:
    return next((folder / place for place in places if (folder / place / marker).exists()), None)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
