"""BatchNorm when the batch is spread over ranks, or over micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class AllReduceBatchNorm(_BatchNorm):
    """BatchNorm whose batch statistics are those of all ranks together: ``nn.SyncBatchNorm`` for the CPU.

    PyTorch's own refuses CPU tensors. Sums run in float64, so that E[x²] − E[x]² is safe; the all-reduce is
    differentiable, hence the gradient is that of one process with the whole batch.
    """

    process_group: dist.ProcessGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions [N, C, …], got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, …] -> the same shape."""
        if not self.training:
            return super().forward(input)
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        sums = torch.cat(
            [
                input.sum(axes, dtype=torch.float64),
                (input * input).sum(axes, dtype=torch.float64),
                torch.tensor([input.numel() // input.shape[1]], dtype=torch.float64, device=input.device),
            ]
        )
        sums = _AllReduceSum.apply(sums, self.process_group)
        count = sums[-1].detach()
        mean, square = sums[:-1].chunk(2)
        mean, square = mean / count, square / count
        variance = (square - mean * mean).clamp_min(0)
        self._update_running(mean, variance * (count / (count - 1).clamp_min(1)))
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight
        shift = -mean * scale
        if self.affine:
            shift = shift + self.bias
        return input * scale.to(input.dtype).view(shape) + shift.to(input.dtype).view(shape)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), weight)


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; each rank's sum feeds every rank's loss, so the gradient is summed over ranks as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def synchronise_batchnorm(module: nn.Module, device: torch.device, group: dist.ProcessGroup) -> None:
    """Replace every BatchNorm inside by one over all ranks of ``group``; parameters, buffers and names stay."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            shape = (child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            new: nn.SyncBatchNorm | AllReduceBatchNorm
            new = nn.SyncBatchNorm(*shape) if device.type == "cuda" else AllReduceBatchNorm(*shape)
            new.process_group = group
            new.train(child.training)
            for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(new, tensor, getattr(child, tensor))  # the same tensors, not copies in another dtype
            setattr(module, name, new)
        else:
            synchronise_batchnorm(child, device, group)


@torch.no_grad()
def average_running_statistics(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Give every rank the mean over ranks of all running means and variances (for per-rank BatchNorm)."""
    buffers = [
        buffer
        for child in module.modules()
        if isinstance(child, _BatchNorm)
        for buffer in (child.running_mean, child.running_var)
        if buffer is not None
    ]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean)


@contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """Inside, a forward pass in train mode leaves the running statistics alone."""
    tracking = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for child in tracking:
        child.track_running_stats = False
    try:
        yield
    finally:
        for child in tracking:
            child.track_running_stats = True
