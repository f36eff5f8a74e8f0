"""What a loss over several processes needs of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.transfer import to_device

_agreed: set[tuple[str, str, torch.Size, torch.dtype]] = set()


def group_or_none(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """None for a group of one process, which is as good as none.

    Raises:
        ValueError: this process is not a member.
    """
    if group is None:
        return None
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not a member of the group; pass a group that it belongs to")
    return group if dist.get_world_size(group) > 1 else None


def gather_rows(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] of every rank, in their order: [W·n, ...]. Without gradient; all ranks must hold as many rows."""
    gathered = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
    return gathered


def exchange_parts(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[W·n, ...], of which rows j·n and following are for rank j: [W, n, ...], what each rank has for this one.

    Without gradient. A rank receives as much as it holds, where gathering would bring it W times that.
    """
    received = torch.empty_like(local, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, local.contiguous(), group=group)
    return received.unflatten(0, (dist.get_world_size(group), -1))


def check_same_on_ranks(rows: Tensor, group: dist.ProcessGroup) -> None:
    """Refuse batches [N, D] that differ over the ranks in shape or size of an element.

    Raises:
        ValueError: with the shapes of all ranks, on each that has this shape for the first time; on a GPU the others
            stop with a failed assertion.
    """
    mine = to_device(torch.tensor([*rows.shape, rows.element_size()]), rows.device)
    shapes = gather_rows(mine[None], group)
    # Reading them back would stall a GPU in every step, so there a rank does it when a shape first comes up; later the
    # device itself looks, before the next collective can hang. All take part every time.
    known = (group.group_name, rows.device.type, rows.shape, rows.dtype)
    if rows.device.type != "cpu" and known in _agreed:
        torch._assert_async((shapes == mine).all(), "ranks hold batches of different shape or dtype")
        return
    if not torch.equal(shapes, mine.expand_as(shapes)):
        raise ValueError(
            f"ranks hold batches of different shape or dtype ([N, D, bytes] by rank: {shapes.tolist()}), "
            "expected the same on all; drop or pad the last batch"
        )
    _agreed.add(known)


def gather_rows_with_gradient(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """As `gather_rows`. Backward hands each rank the sum over all ranks of the gradients of its rows.

    Where every rank computes the same global loss from what it gathered, that sum is W times the gradient of one
    such loss, and averaging over the ranks gives it back exactly.
    """
    gathered: Tensor = _GatherRows.apply(local, group)
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.rows = group, len(local)
        return gather_rows(local, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(ctx.rows, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None


def mean_over_ranks(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The mean over ranks of a scalar, whose gradient is that of this rank's own.

    What a loss that is a mean over each rank's own anchors is to return: its gradient is W times that of the mean,
    so that averaging gradients over the ranks is exact, if what was gathered hands its gradient back summed.
    """
    if group is None:
        return local
    mean: Tensor = _MeanOverRanks.apply(local, group)
    return mean


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        mean = local.clone()
        dist.all_reduce(mean, group=group)
        return mean / dist.get_world_size(group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
