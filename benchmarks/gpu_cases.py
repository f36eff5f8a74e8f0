"""What `benchmarks/gpu.py` times: our kernels first, then how one would do the same otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_checks import crops_and_params
from kernels.bregman import bregman_loss
from kernels.contrastive import contrastive_loss
from kernels.distance import distance_correlation
from kernels.kmeans import kmeans_assign
from kernels.nearest import nearest
from kernels.ntxent import ntxent
from kernels.photometric import photometric
from kernels.simplex import simplex_loss

Run = Callable[[], Any]
TEMPERATURE = 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Case:
    """Contenders, ours first, each a function that makes its inputs and returns what is timed. The floor is that of
    so many floating-point operations of matrix products, or of so many bytes moved."""

    name: str
    contenders: Mapping[str, Callable[[], Run]]
    operations: float = 0
    moved: float = 0


def cases(device: torch.device, smoke: bool) -> Iterator[Case]:
    sizes = [(32, 16)] if smoke else [(512, 128), (2048, 128), (8192, 128), (32768, 128), (32768, 256), (131072, 128)]
    for rows, d in sizes:
        yield Case(
            f"ntxent 2N={rows}, D={d}, bf16, forward + backward",
            {
                "twinstream": partial(ntxent_run, fused_ntxent, rows, d, device),
                "plain, autocast": partial(ntxent_run, plain_ntxent, rows, d, device),
                "plain, compiled": partial(ntxent_run, compiled_ntxent, rows, d, device),
                "lightly": partial(lightly_run, rows, d, device),
            },
            operations=6 * rows**2 * d,
        )
    n, d = (16, 16) if smoke else (16384, 256)
    yield Case(
        f"contrastive N={n}, D={d}, bf16, rows against columns both ways, forward + backward",
        {
            "twinstream": partial(both_ways_run, n, d, device),
            "Inf-CL": partial(inf_cl_run, n, d, device),
            "CCE exact": partial(cce_run, n, d, device),
        },
        operations=20 * n**2 * d,
    )
    m, count, d = (16, 64, 16) if smoke else (4096, 98304, 256)
    for k in (1, 4 if smoke else 20):
        yield Case(
            f"nearest {m} x {count} x {d}, k={k}, bf16",
            {
                "twinstream": partial(nearest_run, m, count, d, k, device),
                "matmul + argmax or topk": partial(matmul_search_run, m, count, d, k, device),
                "flashlib": partial(flashlib_run, m, count, d, k, device),
            },
            operations=2 * m * count * d,
        )
    m, k, d = (64, 8, 16) if smoke else (1_280_000, 3000, 256)
    yield Case(
        f"kmeans assign + sums {m} x {d}, K={k}, bf16",
        {
            "twinstream": partial(kmeans_run, m, k, d, device),
            "matmul + argmax + index_add": partial(plain_kmeans_run, m, k, d, device),
            "flash-kmeans (assign)": partial(flash_kmeans_run, m, k, d, device),
        },
        operations=2 * m * k * d,
    )
    count, size = (4, 16) if smoke else (512, 224)
    yield Case(
        f"photometric {count} crops of {size} x {size}, bf16",
        {
            "twinstream": partial(photometric_run, count, size, device, "auto" if device.type == "cuda" else "triton"),
            "vectorised PyTorch": partial(photometric_run, count, size, device, "reference"),
            "kornia": partial(kornia_run, count, size, device),
        },
        moved=count * size**2 * 3 * 3,
    )
    n, c = (16, 16) if smoke else (8192, 128)
    yield Case(
        f"simplex N={n}, C={c}, forward + backward",
        {name: partial(pair_run, simplex_loss, n, c, device, backend) for name, backend in backends(device).items()},
        operations=8 * n**2 * c,
    )
    n, k = (16, 5) if smoke else (16384, 100)
    yield Case(
        f"bregman N={n}, K={k}, forward + backward",
        {
            name: partial(pair_run, partial(bregman_loss, temperature=TEMPERATURE), n, k, device, backend)
            for name, backend in backends(device).items()
        },
        moved=2 * n * k * 4 * 3,
    )
    n, p = (8, 16) if smoke else (1024, 8192)
    yield Case(
        f"distance correlation n={n}, p=q={p}, forward + backward",
        {
            name: partial(pair_run, distance_correlation, n, p, device, backend)
            for name, backend in backends(device).items()
        },
        operations=12 * n**2 * p,
    )


def backends(device: torch.device) -> dict[str, str]:
    return {"twinstream": "auto" if device.type == "cuda" else "triton", "plain": "reference"}


# ---- NT-Xent -------------------------------------------------------------------------------------------


def fused_ntxent(z1: Tensor, z2: Tensor) -> Tensor:
    backend = "auto" if z1.device.type == "cuda" else "triton"
    loss: Tensor = ntxent(z1, z2, temperature=TEMPERATURE, backend=backend)
    return loss


def plain_ntxent(z1: Tensor, z2: Tensor) -> Tensor:
    with torch.autocast(z1.device.type, torch.bfloat16):
        z = F.normalize(torch.cat([z1, z2]), dim=1)
        logits = (z @ z.T / TEMPERATURE).fill_diagonal_(-math.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z1)))


_compiled: list[Callable[[Tensor, Tensor], Tensor]] = []


def compiled_ntxent(z1: Tensor, z2: Tensor) -> Tensor:
    if not _compiled:
        _compiled.append(torch.compile(plain_ntxent, dynamic=False))
    return _compiled[0](z1, z2)


def two_views(n: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    first = torch.randn(n, d, generator=generator, device=device)
    second = first + torch.randn(n, d, generator=generator, device=device)
    return first.bfloat16().requires_grad_(), second.bfloat16().requires_grad_()


def with_gradient(loss: Callable[..., Tensor], *inputs: Tensor) -> Run:
    return lambda: torch.autograd.grad(loss(*inputs), inputs)


def ntxent_run(loss: Callable[[Tensor, Tensor], Tensor], rows: int, d: int, device: torch.device) -> Run:
    return with_gradient(loss, *two_views(rows // 2, d, device))


def lightly_run(rows: int, d: int, device: torch.device) -> Run:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)

    def under_autocast(z1: Tensor, z2: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            value: Tensor = loss(z1, z2)
            return value

    return with_gradient(under_autocast, *two_views(rows // 2, d, device))


def both_ways_run(n: int, d: int, device: torch.device) -> Run:
    q, k = (F.normalize(z.detach().float()).bfloat16().requires_grad_() for z in two_views(n, d, device))
    positive = torch.arange(n, device=device)
    options: dict[str, Any] = {
        "temperature": TEMPERATURE,
        "backend": "auto" if device.type == "cuda" else "triton",
    }

    def loss(q: Tensor, k: Tensor) -> Tensor:
        there, back = contrastive_loss(q, k, positive, **options), contrastive_loss(k, q, positive, **options)
        mean: Tensor = (there + back).mean()
        return mean

    return with_gradient(loss, q, k)


def inf_cl_run(n: int, d: int, device: torch.device) -> Run:
    from inf_cl import cal_inf_loss

    q, k = (F.normalize(z.detach().float()).requires_grad_() for z in two_views(n, d, device))
    scale = torch.tensor(1 / TEMPERATURE, device=device)
    return with_gradient(lambda q, k: cal_inf_loss(q, k, scale=scale) + cal_inf_loss(k, q, scale=scale), q, k)


def cce_run(n: int, d: int, device: torch.device) -> Run:
    from cut_cross_entropy import linear_cross_entropy

    q, k = (F.normalize(z.detach().float()).bfloat16().requires_grad_() for z in two_views(n, d, device))
    targets = torch.arange(n, device=device)

    def loss(q: Tensor, k: Tensor) -> Tensor:
        scaled, other = q / TEMPERATURE, k / TEMPERATURE
        both: Tensor = linear_cross_entropy(scaled, k, targets, impl="cce_exact")
        return both + linear_cross_entropy(other, q, targets, impl="cce_exact")

    return with_gradient(loss, q, k)


def pair_run(loss: Callable[..., Tensor], n: int, d: int, device: torch.device, backend: str) -> Run:
    inputs = [z.detach().float().requires_grad_() for z in two_views(n, d, device)]
    return with_gradient(partial(loss, backend=backend), *inputs)


# ---- search and k-means --------------------------------------------------------------------------------


def unit_rows(m: int, count: int, d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    queries = torch.randn(m, d, generator=generator, device=device)
    bank = torch.randn(count, d, generator=generator, device=device)
    return F.normalize(queries).bfloat16(), F.normalize(bank).bfloat16()


def nearest_run(m: int, count: int, d: int, k: int, device: torch.device) -> Run:
    queries, bank = unit_rows(m, count, d, device)
    backend = "auto" if device.type == "cuda" else "triton"
    return lambda: nearest(queries, bank, k=k, backend=backend)


def matmul_search_run(m: int, count: int, d: int, k: int, device: torch.device) -> Run:
    queries, bank = unit_rows(m, count, d, device)
    if k == 1:
        return lambda: (queries @ bank.T).argmax(1)
    return lambda: (queries @ bank.T).topk(k, dim=1)


def flashlib_run(m: int, count: int, d: int, k: int, device: torch.device) -> Run:
    from flashlib import flash_knn

    queries, bank = unit_rows(m, count, d, device)
    return lambda: flash_knn(queries, bank, k=k)


def kmeans_run(m: int, k: int, d: int, device: torch.device) -> Run:
    rows, centres = unit_rows(m, k, d, device)
    backend = "auto" if device.type == "cuda" else "triton"
    return lambda: kmeans_assign(rows, centres, metric="euclidean", backend=backend)


def plain_kmeans_run(m: int, k: int, d: int, device: torch.device) -> Run:
    rows, centres = unit_rows(m, k, d, device)

    def run() -> tuple[Tensor, Tensor]:
        ids = torch.addmm(centres.float().square().sum(1).mul_(-0.5).to(rows.dtype), rows, centres.T).argmax(1)
        sums = torch.zeros(k, d, device=device).index_add_(0, ids, rows.float())
        return sums, torch.bincount(ids, minlength=k)

    return run


def flash_kmeans_run(m: int, k: int, d: int, device: torch.device) -> Run:
    from flash_kmeans import batch_kmeans_Euclid

    rows, centres = unit_rows(m, k, d, device)
    return lambda: batch_kmeans_Euclid(rows[None], k, max_iters=1, init_centroids=centres[None])


# ---- augmentation --------------------------------------------------------------------------------------


def photometric_run(count: int, size: int, device: torch.device, backend: str) -> Run:
    crops, params = crops_and_params(count, size)
    crops = crops.to(device)
    return lambda: photometric(crops, params, mean=MEAN, std=STD, out_dtype=torch.bfloat16, backend=backend)


def kornia_run(count: int, size: int, device: torch.device) -> Run:
    import kornia.augmentation as K

    crops, _ = crops_and_params(count, size)
    images = crops.to(device).permute(0, 3, 1, 2).float().div(255).contiguous()
    kernel = max(2 * (size // 20) + 1, 3)
    chain = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=0.5),
        K.RandomSolarize(0.0, 0.0, p=0.1),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )
    return lambda: chain(images)
