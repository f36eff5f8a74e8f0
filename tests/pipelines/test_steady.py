"""When a view that is not augmented has the same pixels in every epoch: what may be remembered of it hangs on that."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipelines.choice import build_loader, steady_pixels
from pipelines.config import LoaderConfig
from pipelines.sources import DataConfig, open_source
from pipelines.views import View
from tests.pipelines.stored_sets import write_photos

PLAN = (View(crop="center"), View(crop="random_resized"))


def plain_views(kind: str, folder: Path, scaled: bool) -> tuple[list[Tensor], bool]:
    """The un-augmented views of two epochs in the order of the images, and what `steady_pixels` says of them."""
    source = open_source(DataConfig(source="folder", root=folder, holdout=0), "pretrain")
    config = LoaderConfig(scaled=scaled)
    loader = build_loader(kind, source, PLAN, config=config, size=16, batch_size=42, seed=0, device=torch.device("cpu"))
    epochs = []
    for epoch in (0, 1):
        [[batch]] = loader.epoch(epoch)
        epochs.append(batch.views[0][batch.indices.argsort()])
    loader.close()
    return epochs, steady_pixels(kind, source, config)


@pytest.mark.parametrize(
    ("kind", "scaled"), [("native", True), ("native", False), ("plain", False), ("resident", True)]
)
def test_steady_pixels_are_the_same_in_every_epoch_and_others_are_not(kind: str, scaled: bool, tmp_path: Path) -> None:
    write_photos(tmp_path, 42)
    (first, second), steady = plain_views(kind, tmp_path, scaled)
    assert torch.equal(first, second) == steady
    assert steady == (kind == "resident" or not scaled)
