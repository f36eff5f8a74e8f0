"""How far the pixels of two loaders lie apart: crops of 224 pixels of the same photographs, from the same boxes.

    python benchmarks/loader_pixels.py --data FOLDER_OF_JPEGS [--json FILE]

The reference is the plain loader: torchvision's decode and its antialiased resize. Differences are the mean over the
pixels of an image's two crops, of 255.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.loaders import convert
from pipelines.choice import build_loader
from pipelines.config import LoaderConfig
from pipelines.sources import DataConfig, open_source
from pipelines.views import ViewsConfig

CASES = {
    "native, whole decode": ("native", "files", {"scaled": False}),
    "native, scaled decode": ("native", "files", {}),
    "dali": ("dali", "files", {}),
    "ffcv, the same JPEGs": ("ffcv", "ffcv", {"scaled": False}),
    "ffcv, encoded anew, side up to 500": ("ffcv", "ffcv q90", {"scaled": False}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of class folders of JPEGs")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: convert(options.data, Path(folder), name) for name in {store for _, store, _ in CASES.values()}}
        reference = crops("plain", options.data, {})
        for name, (kind, store, settings) in CASES.items():
            found = crops(kind, stores[store], settings)
            each = torch.stack([(a - b).abs().mean() for a, b in zip(reference, found, strict=True)])
            rows.append({"loader": name, "images": len(each), "mean": each.mean().item(), "worst": each.max().item()})
    table = Table(title=f"{len(reference)} images, against the plain loader, of 255")
    for column in ("loader", "mean", "worst image"):
        table.add_column(column)
    for row in rows:
        table.add_row(row["loader"], f"{row['mean']:.2f}", f"{row['worst']:.2f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


def crops(kind: str, store: Path, settings: dict[str, Any]) -> list[Tensor]:
    """The crops [V, 224, 224, 3] of each image, in the order of the set."""
    source = open_source(DataConfig(source="folder", root=store, holdout=0), "pretrain")
    config = LoaderConfig.model_validate({"loader": kind, "workers": 1, **settings})
    plan = ViewsConfig(plan="simclr").resolve()
    shared: dict[str, Any] = {"size": 224, "batch_size": 1, "seed": 0, "device": torch.device("cpu")}
    loader: Any = build_loader(kind, source, plan, config=config, **shared)
    batches = list(loader.crops(0, torch.arange(len(source)).split(50)))
    loader.close()
    return [crop.float() for batch in batches for crop in batch.crops.unbind(1)]


if __name__ == "__main__":
    main()
