"""What `benchmarks/kernels.py` compares: our kernels, and how one would do the same with other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Run
from kernels import bregman_loss, kmeans_assign, nearest, ntxent, photometric

TEMPERATURE = 0.1


def cases() -> Iterator[Case]:
    for rows, repeats, lightly, plain in ((512, 200, 2, 1.3), (2048, 25, 3, 1.7), (8192, 5, 5, 3)):
        yield Case(
            f"ntxent 2N={rows}, D=128, forward + backward",
            partial(ntxent_contenders, rows),
            repeats=repeats,
            error=partial(ntxent_error, rows),
            targets={"lightly": lightly, "plain": plain},
            memory=("twinstream", "plain", "lightly") if rows == 8192 else (),
        )
    for queries, threads, targets in ((512, 1, {"lightly": 1.7}), (4096, 2, {"lightly": 1.3, "faiss": 0.75})):
        yield Case(
            f"nearest {queries} x 98304 x 256, k=1",
            partial(nearest_contenders, queries),
            repeats=5 if queries == 512 else 3,
            targets=targets,
            memory=("twinstream", "lightly", "faiss"),
            threads=threads,
        )
    yield Case(
        "kmeans 50000 x 128, K=256, assign + sums",
        kmeans_contenders,
        targets={"cdist": 1.5},
        memory=("twinstream", "cdist"),
    )
    yield Case(
        "bregman 2N=8192, K=100, forward + backward",
        bregman_contenders,
        repeats=3,
        error=bregman_error,
        targets={"matrix": 50},
        memory=("twinstream", "matrix"),
    )
    for views, size, repeats in ((128, 224, 5), (512, 32, 10)):
        yield Case(
            f"photometric {views} views of {size} x {size}",
            partial(photometric_contenders, views, size),
            repeats=repeats,
            targets={"torchvision v2": 5} if size == 224 else {},
        )


def installed(makers: Mapping[str, Callable[[], Run]]) -> dict[str, Run]:
    contenders = {}
    for name, make in makers.items():
        try:
            contenders[name] = make()
        except ImportError as missing:
            print(f"{name} is left out: {missing}")
    return contenders


# ---- NT-Xent -------------------------------------------------------------------------------------------


def two_views(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(rows // 2, 128, generator=generator)
    z2 = z1 + torch.randn(rows // 2, 128, generator=generator)
    return z1.requires_grad_(), z2.requires_grad_()


def plain_ntxent(z1: Tensor, z2: Tensor) -> Tensor:
    """The loss as one would write it in PyTorch."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


def ntxent_contenders(rows: int, small: bool) -> dict[str, Run]:
    z1, z2 = two_views(16 if small else rows)

    def with_gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Run:
        def run() -> tuple[Tensor, Tensor]:
            value = loss(z1, z2)
            first, second = torch.autograd.grad(value, (z1, z2))
            return first, second

        return run

    def lightly() -> Run:
        from lightly.loss import NTXentLoss

        return with_gradient(NTXentLoss(temperature=TEMPERATURE))

    def metric_learning() -> Run:
        from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

        return with_gradient(SelfSupervisedLoss(NTXentLoss(temperature=TEMPERATURE)))

    makers = {
        "twinstream": lambda: with_gradient(partial(ntxent, temperature=TEMPERATURE)),
        "plain": lambda: with_gradient(plain_ntxent),
        "lightly": lightly,
    }
    if rows <= 512:  # its memory grows with the cube of the batch: 34 GB at 2,048
        makers["pytorch-metric-learning"] = metric_learning
    return installed(makers)


def ntxent_error(rows: int, gradients: tuple[Tensor, Tensor]) -> float:
    z1, z2 = (z.detach().double().requires_grad_() for z in two_views(rows))
    exact = torch.cat(torch.autograd.grad(plain_ntxent(z1, z2), (z1, z2)))
    return ((torch.cat(gradients) - exact).norm() / exact.norm()).item()


# ---- nearest neighbours and k-means --------------------------------------------------------------------


def nearest_contenders(queries: int, small: bool) -> dict[str, Run]:
    size, count = (64, 8) if small else (98304, queries)
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(size, 256, generator=generator), dim=1)
    rows = F.normalize(torch.randn(count, 256, generator=generator), dim=1)

    def lightly() -> Run:
        from lightly.models.modules import NNMemoryBankModule

        module = NNMemoryBankModule(size=(size, 256))
        module(rows[:1], update=True)  # makes the bank
        module.bank = bank
        return lambda: module(rows)

    def faiss() -> Run:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(256)
        index.add(bank.numpy())
        return lambda: index.search(rows.numpy(), 1)

    return installed(
        {
            "twinstream": lambda: lambda: nearest(rows, bank),
            "matmul + max": lambda: lambda: (rows @ bank.T).max(1),
            "lightly": lightly,
            "faiss": faiss,
        }
    )


def kmeans_contenders(small: bool) -> dict[str, Run]:
    count, k = (64, 4) if small else (50_000, 256)
    generator = torch.Generator().manual_seed(0)
    rows, centres = torch.randn(count, 128, generator=generator), torch.randn(k, 128, generator=generator)

    def cdist() -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.cdist(rows, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, ids, rows)
        return ids, sums, torch.bincount(ids, minlength=k)

    return {"twinstream": lambda: kmeans_assign(rows, centres, metric="euclidean"), "cdist": cdist}


# ---- Bregman -------------------------------------------------------------------------------------------


def scores(small: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 8 if small else 4096, 100, generator=generator)
    return first.requires_grad_(), second.requires_grad_()


def bregman_matrix(first: Tensor, second: Tensor) -> Tensor:
    """The loss over the 2N x 2N matrix of divergences, as it is defined."""
    s = torch.cat([first, second])
    largest, winner = s.max(1)
    divergence = largest[:, None] - s[:, winner]
    logits = (torch.exp(-divergence / (2 * 0.9**2)) / TEMPERATURE).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(s)).roll(len(first)))


def bregman_contenders(small: bool) -> dict[str, Run]:
    first, second = scores(small)
    return {
        "twinstream": lambda: torch.autograd.grad(
            bregman_loss(first, second, sigma=0.9, temperature=TEMPERATURE), (first, second)
        ),
        "matrix": lambda: torch.autograd.grad(bregman_matrix(first, second), (first, second)),
    }


def bregman_error(gradients: tuple[Tensor, Tensor]) -> float:
    first, second = (s.detach().double().requires_grad_() for s in scores(False))
    exact = torch.cat(torch.autograd.grad(bregman_matrix(first, second), (first, second)))
    return ((torch.cat(gradients) - exact).norm() / exact.norm()).item()


# ---- augmentation --------------------------------------------------------------------------------------


def photometric_contenders(views: int, size: int, small: bool) -> dict[str, Run]:
    """What SimCLR does to a crop after cutting it: flip .5, jitter .8 of .8 .8 .8 .2, gray .2, blur .5 (at 224)."""
    from torchvision.transforms import v2

    from pipelines.views import View, draw_photometric

    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    blurred = 0.5 if size > 100 else 0.0
    crops = smooth_crops(4 if small else views, size)
    view = View(
        flip=0.5, jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grayscale=0.2, blur=blurred
    )

    def ours(backend: str) -> Run:
        # Torchvision draws its parameters as well.
        indices = torch.arange(len(crops))
        return lambda: photometric(
            crops,
            draw_photometric(view, seed=0, epoch=0, indices=indices, view_index=0, size=size),
            mean=mean,
            std=std,
            backend=backend,
        )

    chain: list[Any] = [
        v2.ToDtype(torch.float32, scale=True),  # first: on floats torchvision is faster than on bytes
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        v2.RandomGrayscale(0.2),
    ]
    if blurred:
        chain.append(v2.RandomApply([v2.GaussianBlur(view.kernel(size), (0.1, 2.0))], p=blurred))
    chain.append(v2.Normalize(mean, std))
    transform = v2.Compose(chain)
    images = list(crops.permute(0, 3, 1, 2).contiguous())
    return {
        "twinstream": ours("auto"),
        "torchvision v2": lambda: torch.stack([transform(image) for image in images]),
        "vectorised PyTorch": ours("reference"),
    }


def smooth_crops(count: int, size: int) -> Tensor:
    """[count, size, size, 3] uint8 with the slow changes of a photograph, and noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    crops = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    crops = crops + 0.05 * torch.randn(crops.shape, generator=generator)
    return (crops.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
