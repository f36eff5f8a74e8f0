"""Images of coloured rectangles on noise, in VOC's format and in COCO's, for tests of detection."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {"brick": (220, 60, 40), "pool": (40, 110, 230)}


def draw(folder: Path, count: int, seed: int, side: int = 96) -> list[tuple[str, list[tuple[str, list[int]]]]]:
    """JPEGs in the folder; (stem, [(class, [left, top, right, bottom])]) of each, one or two objects."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for number in range(count):
        pixels = rng.integers(70, 150, (side, side, 3)).astype(np.uint8)
        objects = []
        for half in range(int(rng.integers(1, 3))):  # one above, one below: they never overlap
            name = list(COLOURS)[int(rng.integers(2))]
            width, height = rng.integers(side // 4, side // 2 - 4, 2).tolist()
            left = int(rng.integers(0, side - width))
            top = int(rng.integers(0, side // 2 - height)) + half * (side // 2)
            pixels[top : top + height, left : left + width] = COLOURS[name]
            objects.append((name, [left, top, left + width, top + height]))
        stem = f"{seed:02d}{number:04d}"
        Image.fromarray(pixels).save(folder / f"{stem}.jpg", quality=95)
        drawn.append((stem, objects))
    return drawn


def voc_xml(objects: list[tuple[str, list[int], int]]) -> str:
    """Objects as (class, box in pixels from 0 without the last, difficult)."""
    body = "".join(
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0] + 1}</xmin>"
        f"<ymin>{box[1] + 1}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>"
        f"<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part></object>"
        for name, box, difficult in objects
    )
    return f"<annotation>{body}</annotation>"


def write_voc(root: Path, train: int, test: int) -> None:
    base = root / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    for part, count, seed in (("trainval", train, 0), ("test", test, 1)):
        drawn = draw(base / "JPEGImages", count, seed)
        for stem, objects in drawn:
            (base / "Annotations" / f"{stem}.xml").write_text(voc_xml([(n, box, 0) for n, box in objects]))
        (base / "ImageSets/Main" / f"{part}.txt").write_text("".join(f"{stem}\n" for stem, _ in drawn))


def write_coco(root: Path, train: int, test: int) -> None:
    """The same images and objects; the categories' ids are 7 and 3."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    ids = {"brick": 7, "pool": 3}
    for part, count, seed in (("train2017", train, 0), ("val2017", test, 1)):
        content: dict[str, Any] = {
            "categories": [{"id": number, "name": name} for name, number in ids.items()],
            "images": [],
            "annotations": [],
        }
        for number, (stem, objects) in enumerate(draw(root / part, count, seed), start=100):
            content["images"].append({"id": number, "file_name": f"{stem}.jpg", "width": 96, "height": 96})
            for name, (left, top, right, bottom) in objects:
                box = [left, top, right - left, bottom - top]
                content["annotations"].append({"image_id": number, "category_id": ids[name], "bbox": box, "iscrowd": 0})
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
