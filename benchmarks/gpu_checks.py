"""What `benchmarks/gpu.py` checks before it times: every fused kernel on fresh random inputs, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bregman import bregman_loss
from kernels.contrastive import contrastive_loss
from kernels.distance import distance_correlation
from kernels.kmeans import kmeans_assign
from kernels.nearest import nearest
from kernels.ntxent import ntxent
from kernels.photometric import PhotometricParams, photometric
from kernels.simplex import simplex_loss


@dataclass(frozen=True)
class Check:
    """error() is to be at most `allowed`: of a gradient, say, relative to that of the float64 formula."""

    name: str
    allowed: float
    error: Callable[[], float]


def checks(device: torch.device, seed: int, smoke: bool) -> Iterator[Check]:
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def views(n: int, d: int, dtype: torch.dtype, noise: float = 1.0) -> list[Tensor]:
        first = randn(n, d)
        return [first.to(dtype), (first + noise * randn(n, d)).to(dtype)]

    shapes = [(17, 20)] if smoke else [(1, 8), (1000, 128), (1333, 100), (700, 256), (301, 1000)]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for n, d in shapes:
        for dtype in dtypes:
            # Half precision rounds the gradient itself: by 2^-9 or 2^-12 of each entry.
            allowed = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}[dtype]
            for temperature in (0.01, 0.1, 1.0) if (n, d) == shapes[len(shapes) // 2] else (0.1,):
                name = f"N={n}, D={d}, {str(dtype)[6:]}, T={temperature}"
                noise = 4.0 if temperature < 0.1 else 1.0  # else the gradient is less than float16 can say
                yield Check(
                    f"ntxent {name}",
                    allowed * max(1, 0.03 / temperature),
                    gradient_error(ntxent, views(n, d, dtype, noise), temperature=temperature),
                )
                yield Check(
                    f"contrastive {name}",
                    2 * allowed * max(1, 0.03 / temperature),
                    contrastive_error(views(n, d, dtype, noise), temperature),
                )
    for n, c in [(17, 20)] if smoke else [(1000, 128), (333, 1000)]:
        for temperature in (0.1, 1.0):
            yield Check(
                f"simplex N={n}, C={c}, T={temperature}",
                2e-5 / min(1, temperature),
                gradient_error(simplex_loss, views(n, c, torch.float32), temperature=temperature),
            )
    for n, k in [(17, 5)] if smoke else [(1000, 100), (333, 7)]:
        scores = [randn(n, k), randn(n, k)]
        weights = tuple(torch.softmax(3 * s, 1) for s in scores)
        yield Check(f"bregman N={n}, K={k}", 1e-5, gradient_error(bregman_loss, scores, temperature=0.1))
        yield Check(
            f"bregman with soft winners N={n}, K={k}",
            1e-4,
            gradient_error(bregman_loss, scores, temperature=0.1, weights=weights),
        )
    for n, p, q in [(9, 5, 7)] if smoke else [(512, 3072, 128), (257, 33, 1000)]:
        for unbiased in (True, False):
            x, y = randn(n, p), randn(n, q)
            y[:, : min(p, q)] += x[:, : min(p, q)]
            yield Check(
                f"distance correlation n={n}, p={p}, q={q}, unbiased={unbiased}",
                1e-4,
                gradient_error(distance_correlation, [x, y], unbiased=unbiased),
            )
    for m, count, d, k in (
        [(9, 70, 20, 1), (9, 70, 20, 3)]
        if smoke
        else [(1000, 9973, 128, 1), (1000, 9973, 128, 20), (37, 5000, 300, 200)]
    ):
        for dtype in dtypes:
            queries, bank = randn(m, d).to(dtype), randn(count, d).to(dtype)
            yield Check(f"nearest {m} x {count} x {d}, k={k}, {str(dtype)[6:]}", 1e-5, nearest_error(queries, bank, k))
    same = torch.ones(40, 16, device=device)
    yield Check("nearest: the first of equal rows", 0, lambda: float(nearest(same, same, backend="triton")[1].sum()))
    for metric in ("cosine", "euclidean"):
        rows, centres = (randn(33, 20), randn(5, 20)) if smoke else (randn(20011, 128), randn(300, 128))
        yield Check(f"kmeans {metric}", 1e-5, kmeans_error(rows, centres, metric))
    for size, count in ((16, 6),) if smoke else ((224, 32), (37, 64)):
        for dtype in dtypes:
            yield Check(
                f"photometric {count} of {size} x {size}, {str(dtype)[6:]}",
                {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype],
                photometric_error(count, size, dtype, device, seed),
            )


def gradient_error(loss: Callable[..., Tensor], inputs: list[Tensor], **options: Any) -> Callable[[], float]:
    """The larger of the errors of the loss and of its gradient, relative to the reference in float64."""

    def gradient(backend: str, rows: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        rows = [row.detach().requires_grad_() for row in rows]
        value = loss(*rows, backend=backend, **options)
        return value.detach().double(), torch.cat([g.double().flatten() for g in torch.autograd.grad(value, rows)])

    def error() -> float:
        found, found_gradient = gradient("triton", inputs, options)
        wide = {name: _doubled(value) for name, value in options.items()}
        exact, exact_gradient = gradient("reference", [row.double() for row in inputs], wide)
        if not exact_gradient.any():
            return float(found_gradient.norm())
        return max(relative(found, exact), relative(found_gradient, exact_gradient))

    return error


def _doubled(value: Any) -> Any:
    return tuple(part.double() for part in value) if isinstance(value, tuple) else value


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def contrastive_error(rows: list[Tensor], temperature: float) -> Callable[[], float]:
    anchors, candidates = (F.normalize(row.float()).to(row.dtype) for row in rows)
    m = len(anchors)
    positive = torch.arange(m, device=anchors.device)
    exclude = (positive + 1) % m if m > 1 else None

    def losses(a: Tensor, c: Tensor, backend: str, **options: Any) -> Tensor:
        found: Tensor = contrastive_loss(
            a, c, positive, temperature=temperature, exclude=exclude, backend=backend, **options
        )
        return found.mean()

    return gradient_error(losses, [anchors, candidates])


def nearest_error(queries: Tensor, bank: Tensor, k: int) -> Callable[[], float]:
    def error() -> float:
        scores, indices = nearest(queries, bank, k=k, backend="triton")
        exact = queries.double() @ bank.double().T
        best = exact.topk(k, dim=1).values
        # What was found must score as said, and as well as the best: indices of near ties may differ.
        claimed = relative(scores, exact.gather(1, indices))
        return max(claimed, relative(exact.gather(1, indices), best))

    return error


def kmeans_error(rows: Tensor, centres: Tensor, metric: str) -> Callable[[], float]:
    def error() -> float:
        ids, sums, counts = kmeans_assign(rows, centres, metric=metric, backend="triton")
        x, c = rows.double(), centres.double()
        if metric == "cosine":
            x, c = F.normalize(x), F.normalize(c)
        distances = torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist")
        chosen, least = distances.gather(1, ids[:, None])[:, 0], distances.min(1).values
        exact = torch.zeros_like(c).index_add_(0, ids, x)
        miscounted = (counts - torch.bincount(ids, minlength=len(centres))).abs().sum()
        return max(relative(chosen, least), relative(sums, exact), float(miscounted))

    return error


def photometric_error(
    count: int, size: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Callable[[], float]:
    """The largest difference to the reference, but for the few values that a threshold sends elsewhere."""
    crops, params = crops_and_params(count, size, seed)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def error() -> float:
        found = photometric(
            crops.to(device), params, mean=mean, std=std, out_dtype=dtype, backend="triton"
        ).cpu()  # fmt: skip
        exact = photometric(crops, params, mean=mean, std=std, backend="reference")
        wrong = (found.float() - exact).abs().flatten()
        return float(wrong.sort().values[math.ceil(0.9999 * len(wrong)) - 1])

    return error


def crops_and_params(count: int, size: int, seed: int = 0) -> tuple[Tensor, PhotometricParams]:
    """Crops [count, size, size, 3] uint8 that change slowly, as photographs, and SimCLR's draws, on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    crops = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    crops = crops + 0.05 * torch.randn(crops.shape, generator=generator)
    params = PhotometricParams(
        flip=uniform(0, 1) < 0.5,
        jitter=uniform(0, 1) < 0.8,
        order=torch.stack([torch.randperm(4, generator=generator) for _ in range(count)]),
        brightness=uniform(0.2, 1.8),
        contrast=uniform(0.2, 1.8),
        saturation=uniform(0.2, 1.8),
        hue=uniform(-0.2, 0.2),
        grayscale=uniform(0, 1) < 0.2,
        blur_sigma=uniform(0.1, 2) * (uniform(0, 1) < 0.5),
        solarize=uniform(0, 1) < 0.1,
        blur_kernel=max(2 * (size // 20) + 1, 3),
    )
    return (crops.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(), params
