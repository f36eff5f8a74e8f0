"""BatchNorm when the batch is spread over ranks, or over micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kernels.ranks import gather_rows


class AllReduceBatchNorm(_BatchNorm):
    """BatchNorm whose batch statistics are those of all ranks together, as many images on each.

    PyTorch's ``nn.SyncBatchNorm`` refuses CPU tensors; on a GPU it waits for the device in every layer, to leave out
    ranks with an empty batch, which there are none of. The gradient is that of one process with the whole batch.
    """

    process_group: dist.ProcessGroup | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions [N, C, …], got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, …] -> the same shape."""
        if not self.training:
            return super().forward(input)
        if input.device.type == "cuda":
            return self._on_gpu(input)
        mean, variance, count = _statistics(input.detach(), self.process_group)
        self._update_running(mean, variance * (count / (count - 1).clamp_min(1)))
        normalised: Tensor = _Normalise.apply(
            input, self.weight, self.bias, mean, variance, count, self.eps, self.process_group
        )
        return normalised

    def _on_gpu(self, input: Tensor) -> Tensor:
        running_mean, running_var, weight = None, None, self.momentum or 0.0
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            running_mean, running_var = self.running_mean, self.running_var
            if self.momentum is None:  # plain averages: PyTorch, too, waits for the device to know the count
                weight = 1 / float(self.num_batches_tracked)
        if not (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)):
            input = input.contiguous()
        output: Tensor = _GatheredNorm.apply(
            input, self.weight, self.bias, running_mean, running_var, weight, self.eps, self.process_group
        )
        return output

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(unbiased_variance.to(self.running_var.dtype), weight)


def _statistics(input: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and count [] of the batches of all ranks, in float64."""
    wide = _wide(input.dtype)
    unused = torch.zeros(input.shape[1], dtype=wide)  # given, half-precision inputs get statistics in float32
    mean, variance = (t.double() for t in torch.batch_norm_update_stats(input, unused, unused.clone(), 0.0))
    count = torch.tensor([input.numel() // input.shape[1]], dtype=torch.float64)
    sums = torch.cat([mean * count, (variance + mean * mean) * count, count])
    dist.all_reduce(sums, group=group)
    mean, square = (sums[:-1] / sums[-1]).chunk(2)
    return mean, (square - mean * mean).clamp_min(0), sums[-1]


class _Normalise(torch.autograd.Function):
    """(x − mean) / √(variance + eps) · weight + bias, where mean and variance are of the x of all ranks.

    Each rank's x feeds every rank's loss, so with g the gradient and x̂ the normalised x, Σg and Σg·x̂ are summed over
    ranks: dx = weight / σ · (g − Σg / count − x̂ · Σg·x̂ / count). PyTorch's own kernels do the passes over x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        wide = _wide(input.dtype)
        mean, variance = mean.to(wide), variance.to(wide)
        ctx.save_for_backward(input, weight, mean, variance, count)
        ctx.eps, ctx.group = eps, group
        return torch.batch_norm(input, weight, bias, mean, variance, False, 0.0, eps, False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, variance, count = ctx.saved_tensors
        own, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, input, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.cat([of_weight, of_bias]).double()
        dist.all_reduce(sums, group=ctx.group)
        scale = torch.rsqrt(variance.double() + ctx.eps) * (1 if weight is None else weight.double())
        slope, shift = (-scale * part / count for part in sums.chunk(2))
        slope, shift = slope.to(mean.dtype), shift.to(mean.dtype)
        own += torch.batch_norm(input, slope, shift, mean, variance, False, 0.0, ctx.eps, False)
        affine = weight is not None
        return own, of_weight if affine else None, of_bias if affine else None, None, None, None, None, None


class _GatheredNorm(torch.autograd.Function):
    """The same by PyTorch's CUDA kernels, those of ``nn.SyncBatchNorm``: statistics, their union, normalisation."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        channels = input.shape[1]
        mean, scale = torch.batch_norm_stats(input, eps)  # scale: 1 / √(variance + eps)
        count = mean.new_full((1,), input.numel() // channels)
        means, scales, counts = gather_rows(torch.cat([mean, scale, count])[None], group).split(
            [channels, channels, 1], dim=1
        )
        mean, scale = torch.batch_norm_gather_stats_with_counts(
            input, means, scales, running_mean, running_var, momentum, eps, counts.reshape(-1)
        )
        ctx.save_for_backward(input, weight, mean, scale, counts.to(torch.int32))
        ctx.group = group
        normalised: Tensor = torch.batch_norm_elemt(input, weight, bias, mean, scale, eps)
        return normalised

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, scale, counts = ctx.saved_tensors
        if gradient.stride() != input.stride():
            gradient = torch.empty_like(input, dtype=gradient.dtype).copy_(gradient)
        total, product, of_weight, of_bias = torch.batch_norm_backward_reduce(
            gradient, input, mean, scale, weight, True, True, True
        )
        sums = torch.cat([total, product])
        dist.all_reduce(sums, group=ctx.group)
        total, product = sums.chunk(2)
        own = torch.batch_norm_backward_elemt(gradient, input, mean, scale, weight, total, product, counts)
        affine = weight is not None
        return own, of_weight if affine else None, of_bias if affine else None, None, None, None, None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def synchronise_batchnorm(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Replace every BatchNorm inside by one over all ranks of ``group``; parameters, buffers and names stay."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            shape = (child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            new = AllReduceBatchNorm(*shape)
            new.process_group = group
            new.train(child.training)
            for tensor in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(new, tensor, getattr(child, tensor))  # the same tensors, not copies in another dtype
            setattr(module, name, new)
        else:
            synchronise_batchnorm(child, group)


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
