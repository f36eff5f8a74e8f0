"""What a representation is worth: by the code behind `evaluate.py knn` and `evaluate.py linear`, and their settings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.speedrun.data import Data, Part
from trainers.knn import knn_rankings
from trainers.linear import search_logistic
from trainers.scores import ranked_accuracy, top_accuracy

_SETTINGS = [(k, temperature) for k in (10, 20, 100, 200) for temperature in (0.07, 0.1)]
_AT_A_TIME = 1000  # images


@torch.no_grad()
def features(encoder: nn.Module, part: Part, data: Data, device: torch.device) -> Tensor:
    """[N, d] float32 on the device, of whole images as they are."""
    training = encoder.training
    encoder.eval()
    mean, std = (torch.tensor(values, device=device).float() for values in (data.mean, data.std))
    found = []
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        for images in part.images.split(_AT_A_TIME):
            pixels = ((images.to(device).float() / 255 - mean) / std).permute(0, 3, 1, 2)
            found.append(encoder(pixels).float())
    encoder.train(training)
    return torch.cat(found)


def scores(encoder: nn.Module, data: Data, device: torch.device, *, test: bool = True) -> dict[str, float]:
    """Top-1 in percent by kNN and by a linear classifier, on the held-out part (whose labels choose k, temperature and
    L2 strength) and, with `test`, on the whole test split."""
    bank, held = (features(encoder, part, data, device) for part in (data.train, data.holdout))
    labels, held_labels = data.train.labels.to(device), data.holdout.labels.to(device)

    def by_knn(queries: Tensor, truth: Tensor) -> list[float]:
        found = knn_rankings(queries, bank, labels, classes=data.classes, settings=_SETTINGS, device=device)
        return [ranked_accuracy(found[setting], truth, data.classes).top1 for setting in _SETTINGS]

    held_knn = by_knn(held, held_labels)
    best = held_knn.index(max(held_knn))
    search = search_logistic(bank, labels, held, held_labels, data.classes)
    result = {"held_knn": held_knn[best], "held_linear": search.holdout_top1[search.best.l2]}
    if test:
        rows, truth = features(encoder, data.test, data, device), data.test.labels.to(device)
        result["knn"] = by_knn(rows, truth)[best]
        result["linear"] = top_accuracy(search.best.logits(rows), truth)
    return result
