"""What is computed for the pictures: drawn views, features of a bounded sample, neighbours, similarities, maps."""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import nearest
from pipelines.choice import streamed_loader
from pipelines.loading import render
from pipelines.plain_views import plain_batches
from pipelines.sources import DataConfig, DataError, Source, Split, open_source
from pipelines.views import View
from trainers.features import FrozenEncoder, extract

PAIRS = 500  # images of which two views are compared


@dataclass(frozen=True, slots=True)
class Sample:
    """Images to look at and images to search among; no image is in both, and none is of test."""

    queries: Source
    bank: Source
    told: str  # what the queries are, for the page
    labelled: bool


def choose_sample(config: DataConfig, limit: int) -> Sample:
    """At most ``limit`` images of the held-out part, and as many of train.

    Without a held-out part, or without labels, both are of the training images.

    Raises:
        DataError: the data is not there, or is too little.
    """
    everything = open_source(config, "pretrain")
    bank, queries = _opened(config, "train"), _opened(config, "holdout")
    if bank is not None and queries is not None:
        told = "the held-out part of the training images, which the encoder was not trained on"
        return Sample(spread(queries, limit), spread(bank, limit), told, queries.num_classes > 1)
    source = everything if bank is None else bank
    if len(source) < 4:
        raise DataError(f"{source.name} has {len(source)} images; too few to look at")
    places = spread_places(len(source), 2 * limit)
    told = "the training part: nothing is held out, so the encoder knows them"
    if bank is None:
        told = "the training part, which has no labels: the encoder knows them, and nothing says what is right"
    labelled = bank is not None and source.num_classes > 1
    return Sample(source.select(places[0::2]), source.select(places[1::2]), told, labelled)


def _opened(config: DataConfig, split: Split) -> Source | None:
    """None where a set that is there has no such split: no labels, or nothing held out."""
    try:
        return open_source(config, split)
    except DataError:
        return None


def spread(source: Source, limit: int) -> Source:
    """At most ``limit`` images, evenly spaced."""
    return source if len(source) <= limit else source.select(spread_places(len(source), limit))


def spread_places(count: int, limit: int) -> Tensor:
    """[min(count, limit)] positions, evenly spaced over ``count``."""
    chosen = min(count, limit)
    return (torch.arange(chosen) * count) // chosen


def drawn_views(
    source: Source,
    plan: tuple[View, ...],
    positions: Tensor,
    *,
    size: int,
    seed: int,
    epoch: int,
    config: DataConfig,
    device: torch.device,
) -> Tensor:
    """[V, n, 3, size, size] float32, normalised: the views that training draws of these images in this epoch."""
    settings = {"size": size, "batch_size": 1, "seed": seed, "device": device}
    loader = streamed_loader(source, plan, config=config.model_copy(update={"order": "random"}), **settings)
    made = []
    try:
        with closing(loader.on_device(loader.crops(epoch, positions.split(256)))) as batches:
            for batch in batches:
                made.append(render(source, plan, batch.crops, batch.indices, seed=seed, epoch=epoch).views)
    finally:
        loader.close()
    return torch.cat(made, dim=1)


def plain_images(source: Source, size: int, config: DataConfig, device: torch.device) -> np.ndarray:
    """[N, size, size, 3] uint8: the images as evaluation cuts them."""
    return to_pixels(torch.cat([images for images, _ in plain_batches(source, size, 256, device, config)]), source)


def to_pixels(images: Tensor, source: Source) -> np.ndarray:
    """Normalised [..., 3, S, S] back to uint8 [..., S, S, 3]."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (source.mean, source.std))
    pixels = ((images.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.movedim(-3, -1).cpu().numpy()


def unit_features(encoder: FrozenEncoder, source: Source, config: DataConfig, device: torch.device) -> Tensor:
    """[N, d] float32 on the CPU, each of length 1."""
    return F.normalize(extract(encoder, source, device, config).cpu(), dim=1)


@torch.no_grad()
def pair_cosines(
    encoder: FrozenEncoder, source: Source, plan: tuple[View, ...], config: DataConfig, device: torch.device, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of features: of two views of an image [n], and of views of different images [n · (n - 1)].

    The views are the plan's first two; of a plan with one, two draws.
    """
    assert encoder.module is not None
    positions = spread_places(len(source), PAIRS)
    module = encoder.module.to(device).eval()
    # Drawn view by view: eight views of 500 images of 224 pixels would be gigabytes.
    first, second = (
        torch.cat(
            [
                module(_views(part, source, plan, number, encoder, config, device, seed)).float().cpu()
                for part in positions.split(128)
            ]
        )
        for number in (0, 1)
    )
    return cosines_of_pairs(first, second)


def cosines_of_pairs(first: Tensor, second: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of features [n, d] twice: the cosines of equal rows [n], and of all others [n · (n - 1)]."""
    cosines = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    apart = ~torch.eye(len(cosines), dtype=torch.bool)
    return cosines.diagonal().numpy(), cosines[apart].numpy()


def _views(
    positions: Tensor,
    source: Source,
    plan: tuple[View, ...],
    number: int,
    encoder: FrozenEncoder,
    config: DataConfig,
    device: torch.device,
    seed: int,
) -> Tensor:
    """View ``number`` (0 or 1) of each image, [n, 3, S, S]."""
    which, epoch = (number, 0) if len(plan) > 1 else (0, number)
    where: dict[str, Any] = {
        "size": encoder.image_size,
        "seed": seed,
        "epoch": epoch,
        "config": config,
        "device": device,
    }
    return drawn_views(source, plan[:2], positions, **where)[which]


def probability_of_order(positives: np.ndarray, negatives: np.ndarray) -> float:
    """P(a positive > a negative), ties counting half: the area under the ROC curve."""
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    not_above = np.searchsorted(ordered, positives, side="right")
    return float((below + not_above).mean() / (2 * len(ordered)))


def neighbours(queries: Tensor, bank: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cosines [M, k] and places [M, k] of the most similar bank rows, best first; features of length 1."""
    return nearest(queries, bank, k=min(count, len(bank)))


def same_class(labels: Tensor, others: Tensor) -> Tensor:
    """[M, k] bool: whether each of ``others`` [M, k] or [M, k, C] has the class of ``labels`` [M] or one of [M, C]."""
    if labels.ndim == 1:
        return (labels[:, None] == others) & (labels[:, None] >= 0)
    return ((labels[:, None] == 1) & (others == 1)).any(2)


def of_many_classes(source: Source, count: int) -> Tensor:
    """Positions of at most ``count`` images: the first of each of as many classes, else evenly spaced."""
    if source.multi_label:
        return spread_places(len(source), count)
    classes = source.labels[source.labels >= 0].unique()
    chosen = classes[spread_places(len(classes), count)]
    return torch.stack([(source.labels == one).nonzero()[0, 0] for one in chosen])


def most_wrong(right: Tensor, count: int) -> Tensor:
    """Positions of at most ``count`` rows of ``right`` [M, k] with the fewest true, of those that have a false."""
    hits = right.sum(1)
    order = hits.argsort(stable=True)[:count]
    return order[hits[order] < right.shape[1]]


def chance_of_same_class(labels: Tensor, bank: Tensor) -> float:
    """How often a bank image drawn at random would have the class of a query."""
    every = [same_class(part, bank.expand(len(part), *bank.shape)) for part in labels.split(256)]
    return float(torch.cat([part.float().mean(1) for part in every]).mean())


def why_no_map(features: Tensor) -> str | None:
    """What stands against a map of [N, d] features, or None."""
    if not bool(torch.isfinite(features).all()):
        return "the features are not finite"
    if len(features) < 10:
        return f"{len(features)} images are too few for a map"
    if float(features.std(0).max()) < 1e-5:
        return "all images have the same features: the encoder has collapsed"
    return None


def tsne_map(features: Tensor) -> np.ndarray:
    """[N, 2] by t-SNE (van der Maaten & Hinton, 2008), perplexity 30, or less for few images."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(features) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features.numpy()))


def umap_map(features: Tensor) -> np.ndarray | None:
    """[N, 2] by UMAP (arXiv:1802.03426), 15 neighbours; None where umap-learn is not installed."""
    try:
        from umap import UMAP
    except ImportError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed makes it run on one core
        neighbours = min(15, len(features) - 1)
        return np.asarray(UMAP(n_neighbors=neighbours, random_state=0).fit_transform(features.numpy()))
