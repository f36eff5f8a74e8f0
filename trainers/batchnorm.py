"""BatchNorm when the batch is spread over ranks, or over micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
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
        sums = all_reduce(sums, group=self.process_group)
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


def synchronise_batchnorm(module: nn.Module, device: torch.device, group: dist.ProcessGroup) -> nn.Module:
    """Replace every BatchNorm by one over all ranks of ``group``; parameters, buffers and names stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            new = AllReduceBatchNorm(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            new.load_state_dict(child.state_dict())
            new.process_group = group
            new.train(child.training)
            setattr(module, name, new.to(next(child.parameters(), torch.empty(0)).dtype))
        else:
            synchronise_batchnorm(child, device, group)
    return module


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
