"""Classes from words: an encoder's features mapped into the space of a CLIP model, and compared there with text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.linear import mean_and_scale

L2_GRID = tuple(10.0**exponent for exponent in torch.linspace(-6, 2, 17).tolist())
_ROWS = 4096  # in float64 at a time


@dataclass(frozen=True, slots=True)
class RidgeFit:
    """mapped = (x − mean)/scale @ weight + bias; float64."""

    weight: Tensor  # [d, D]
    bias: Tensor  # [D]
    mean: Tensor  # [d]
    scale: Tensor  # [d]
    l2: float

    def __call__(self, features: Tensor) -> Tensor:
        """[N, d] -> [N, D] float32."""
        parts = [(rows.double() - self.mean) / self.scale @ self.weight + self.bias for rows in features.split(_ROWS)]
        return torch.cat(parts).float()


@dataclass(frozen=True, slots=True)
class RidgeSearch:
    best: RidgeFit
    holdout_cosine: dict[float, float]  # L2 strength -> mean cosine of mapped and wanted rows, held-out part
    at_edge: bool  # the best strength is the smallest or largest tried


def search_ridge(
    features: Tensor, wanted: Tensor, holdout: Tensor, holdout_wanted: Tensor, grid: tuple[float, ...] = L2_GRID
) -> RidgeSearch:
    """Minimise mean |wanted − mapped|² + l2 · |weight|² over standardised features; the strength by the held-out part.

    All strengths share one eigendecomposition of the [d, d] second moments, in float64. scikit-learn's ``alpha`` is
    l2 · N. Ties go to the stronger regularisation.

    Args:
        features: [N, d]; dimensions that never vary are only centred.
        wanted: [N, D].
        holdout, holdout_wanted: rows that were not fitted, of which the cosine is taken.
    """
    (mean, scale), count = mean_and_scale(features.double()), len(features)
    bias = wanted.double().mean(0)
    moments = features.new_zeros(len(mean), len(mean), dtype=torch.float64)
    products = features.new_zeros(len(mean), wanted.shape[1], dtype=torch.float64)
    for rows, targets in zip(features.split(_ROWS), wanted.split(_ROWS), strict=True):
        inputs = (rows.double() - mean) / scale
        moments += inputs.T @ inputs / count
        products += inputs.T @ (targets.double() - bias) / count
    values, vectors = torch.linalg.eigh(moments)
    turned = vectors.T @ products
    scores: dict[float, float] = {}
    best: RidgeFit | None = None
    for l2 in sorted(grid, reverse=True):
        weight = vectors @ (turned / (values.clamp_min(0) + l2)[:, None])
        fit = RidgeFit(weight, bias, mean, scale, l2)
        scores[l2] = F.cosine_similarity(fit(holdout), holdout_wanted, dim=1).double().mean().item()
        if best is None or scores[l2] > scores[best.l2]:
            best = fit
    assert best is not None
    return RidgeSearch(best, scores, best.l2 in (min(grid), max(grid)) and len(grid) > 1)


def class_embeddings(prompts: Tensor) -> Tensor:
    """Unit prompt embeddings [C, P, D] -> [C, D]: their mean, of length 1 (arXiv:2103.00020, section 3.1.4)."""
    return F.normalize(prompts.mean(1), dim=1)


def cosine_scores(images: Tensor, prompts: Tensor) -> Tensor:
    """Cosine [N, C] of images [N, D] and the mean of each class's prompts [C, P, D], in float32."""
    return F.normalize(images.float(), dim=1) @ class_embeddings(prompts).T


def bregman_divergences(images: Tensor, prompts: Tensor) -> Tensor:
    """[N, C], not negative: from an image to the nearest prompt of each class, by a functional Bregman divergence.

    The generator is φ(x) = max_k <x, t_k> over all prompts t_k of all classes, of length 1 each: a prompt is its
    own winner and D(x, t_k) = φ(x) − φ(t_k) − <∇φ(t_k), x − t_k> = φ(x) − <x, t_k> (the D of BeCLR, arXiv:2109.07455,
    its learned functionals replaced by prompts). With one prompt a class the order is that of the cosine.

    Args:
        images: [N, D], scaled to length 1 here.
        prompts: [C, P, D], of length 1.
    """
    rows = F.normalize(images.float(), dim=1)
    products = torch.cat(
        [(part @ prompts.flatten(0, 1).T).unflatten(1, prompts.shape[:2]).amax(2) for part in rows.split(_ROWS)]
    )
    return products.amax(1, keepdim=True) - products
