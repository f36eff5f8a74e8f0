"""Exact search of a bank by inner product: no [M, L] score matrix, and of equal scores the lowest index wins."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backends import BACKENDS, choose_backend
from kernels.nearest_cpu import best_k, best_one

TRITON_LARGEST_K = 256


@torch.no_grad()
def nearest(
    queries: Tensor,
    bank: Tensor,
    *,
    k: int = 1,
    exclude: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The ``k`` bank rows with the largest inner product with each query, best first.

    Every backend orders by (score, lowest index), so that equal rows of the bank come in the bank's order. Scores
    are never rounded to the 16 bits of their inputs, in which many would tie. A score that is NaN never matches.

    Args:
        queries: [M, D], any floating dtype; products are accumulated in float32 (float64 where either is float64).
        bank: [L, D], on the same device; may be of another dtype.
        k: how many, 1 <= k <= L.
        exclude: (query_ids [M], bank_ids [L]) integers; a bank row with a query's id never matches it.
        backend: "auto" (Triton on CUDA up to k = 256, else tiles of PyTorch), "triton" (a larger k takes the tiles),
            "tiled", or "reference" (one matrix product and one sort).

    Returns:
        scores [M, k] float32 (float64) and indices [M, k] int64. Where fewer than k rows are allowed, the rest have
        score -inf and index -1.

    Raises:
        ValueError: shapes, devices, k or backend do not fit.
    """
    _check(queries, bank, k, exclude, backend)
    backend = choose_backend(backend, queries, bank)
    if backend == "triton" and k > TRITON_LARGEST_K:
        backend = "tiled"
    with torch.autocast(queries.device.type, enabled=False):
        if backend == "reference":
            return _reference(queries, bank, k, exclude)
        if len(queries) == 0:
            wide = torch.promote_types(torch.promote_types(queries.dtype, bank.dtype), torch.float32)
            return queries.new_empty(0, k, dtype=wide), queries.new_empty(0, k, dtype=torch.int64)
        if backend == "triton":
            from kernels.fused.nearest import fused_best_one
            from kernels.fused.nearest_k import fused_best_k

            if k > 1:
                return fused_best_k(queries, bank, k, exclude)
            scores, indices = fused_best_one(queries, bank, exclude=exclude)
            return scores[:, None], indices[:, None]
        if k > 1:
            return best_k(queries, bank, k, exclude)
        scores, indices = best_one(queries, bank, exclude=exclude)
        return scores[:, None], indices[:, None]


def _reference(queries: Tensor, bank: Tensor, k: int, exclude: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(torch.promote_types(queries.dtype, bank.dtype), torch.float32)
    scores = queries.to(wide) @ bank.to(wide).T
    scores.masked_fill_(scores.isnan(), -torch.inf)
    if exclude is not None:
        scores.masked_fill_(exclude[0][:, None] == exclude[1][None, :], -torch.inf)
    scores, indices = (ordered[:, :k] for ordered in scores.sort(dim=1, descending=True, stable=True))
    return scores, indices.masked_fill(scores == -torch.inf, -1)


def _check(queries: Tensor, bank: Tensor, k: int, exclude: tuple[Tensor, Tensor] | None, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    if queries.dim() != 2 or bank.dim() != 2 or queries.shape[1] != bank.shape[1] or queries.shape[1] == 0:
        raise ValueError(
            f"queries [M, D] and bank [L, D] must share D >= 1, got {list(queries.shape)} and {list(bank.shape)}"
        )
    for name, rows in (("queries", queries), ("bank", bank)):
        if not rows.is_floating_point():
            raise ValueError(f"{name} has dtype {rows.dtype}, expected a floating-point dtype")
    if queries.device != bank.device:
        raise ValueError(f"queries are on {queries.device} and the bank on {bank.device}, expected one device")
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k} must lie between 1 and the bank's {len(bank)} rows")
    if exclude is None:
        return
    if exclude[0].shape != (len(queries),) or exclude[1].shape != (len(bank),):
        raise ValueError(
            f"exclude must be (query_ids [{len(queries)}], bank_ids [{len(bank)}]), got shapes"
            f" {list(exclude[0].shape)} and {list(exclude[1].shape)}"
        )
    for ids in exclude:
        if ids.is_floating_point() or ids.is_complex():
            raise ValueError(f"exclude holds ids of dtype {ids.dtype}, expected integers")
        if ids.device != bank.device:
            raise ValueError(f"exclude holds ids on {ids.device}, expected them on {bank.device}, where the bank is")
