"""The small promises of trainers/batchnorm.py; equality over ranks is in test_engine.py."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.distributed import run_ranks
from trainers.batchnorm import AllReduceBatchNorm, frozen_running_statistics, synchronise_batchnorm


def instead_of_cuda() -> None:
    """What PyTorch's CUDA kernels compute, by their formulas, and the way through them on the CPU."""

    def shaped(values: Tensor) -> Tensor:
        return values[:, None, None]

    def gathered(
        x: Tensor, means: Tensor, scales: Tensor, mean: Tensor, var: Tensor, momentum: float, eps: float, counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights = (counts / counts.sum())[:, None]
        of_all = (weights * means).sum(0)
        variance = (weights * (scales**-2 - eps + means**2)).sum(0) - of_all**2
        mean.lerp_(of_all, momentum)
        var.lerp_(variance * counts.sum() / (counts.sum() - 1), momentum)
        return of_all, (variance + eps).rsqrt()

    def reduced(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, *_: Any) -> tuple[Tensor, ...]:
        product = (g * (x - shaped(mean))).sum((0, 2, 3))
        return g.sum((0, 2, 3)), product, product * scale, g.sum((0, 2, 3))

    def pulled(
        g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, w: Tensor, total: Tensor, product: Tensor, counts: Tensor
    ) -> Tensor:
        slope = shaped(scale**2 * product / counts.sum())
        return (g - shaped(total / counts.sum()) - (x - shaped(mean)) * slope) * shaped(scale * w)

    stand_ins: dict[str, Any] = {
        "batch_norm_stats": lambda x, eps: (
            x.mean((0, 2, 3)),
            (x.var((0, 2, 3), correction=0) + eps).rsqrt(),
        ),
        "batch_norm_gather_stats_with_counts": gathered,
        "batch_norm_elemt": lambda x, w, b, mean, scale, eps: (x - shaped(mean)) * shaped(scale * w) + shaped(b),
        "batch_norm_backward_reduce": reduced,
        "batch_norm_backward_elemt": pulled,
    }
    for name, function in stand_ins.items():
        setattr(torch, name, function)
    AllReduceBatchNorm.forward = AllReduceBatchNorm._on_gpu  # type: ignore[method-assign]


def normalise(group: dist.ProcessGroup, as_on_gpu: bool) -> dict[str, torch.Tensor]:
    """Output, input gradient, parameter gradients and buffers of this rank's uneven share of a batch."""
    if as_on_gpu:
        instead_of_cuda()
    torch.manual_seed(0)
    x = 5 + 3 * torch.randn(7, 4, 3, 3, dtype=torch.float64)
    layer = nn.Sequential(nn.BatchNorm2d(4, momentum=0.3)).double()
    nn.init.uniform_(layer[0].weight)
    nn.init.uniform_(layer[0].bias)
    synchronise_batchnorm(layer, group)
    assert isinstance(layer[0], AllReduceBatchNorm)
    shares = x.split([5, 2]) if dist.get_world_size() == 2 else [x]
    mine = shares[dist.get_rank()].clone().requires_grad_()
    out = layer(mine)
    (out**3).sum().backward()
    for p in layer.parameters():
        dist.all_reduce(p.grad)
    buffers = {name: b.clone() for name, b in layer.named_buffers()}
    return {
        "out": out.detach(),
        "x": mine.grad,
        "w": layer[0].weight.grad,
        "b": layer[0].bias.grad,
        **buffers,
    }


@pytest.mark.parametrize("as_on_gpu", [False, True])
def test_uneven_ranks_against_pytorchs_batchnorm(as_on_gpu: bool) -> None:
    torch.manual_seed(0)
    x = (5 + 3 * torch.randn(7, 4, 3, 3, dtype=torch.float64)).requires_grad_()
    layer = nn.BatchNorm2d(4, momentum=0.3).double()
    nn.init.uniform_(layer.weight)
    nn.init.uniform_(layer.bias)
    out = layer(x)
    (out**3).sum().backward()
    ranks = run_ranks(2, normalise, as_on_gpu)
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(torch.cat([r["out"] for r in ranks]), out.detach(), **close)
    torch.testing.assert_close(torch.cat([r["x"] for r in ranks]), x.grad, **close)
    for r in ranks:
        torch.testing.assert_close(r["w"], layer.weight.grad, **close)
        torch.testing.assert_close(r["b"], layer.bias.grad, **close)
        torch.testing.assert_close(r["0.running_mean"], layer.running_mean, **close)
        torch.testing.assert_close(r["0.running_var"], layer.running_var, **close)
        assert r["0.num_batches_tracked"] == 1


def test_frozen_running_statistics() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3)
    layer, reference = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    before = {n: b.clone() for n, b in layer.named_buffers()}
    with frozen_running_statistics(layer):
        out = layer(x)
    assert all(torch.equal(b, before[n]) for n, b in layer.named_buffers())
    assert torch.equal(out, reference(x)), "the batch is still normalised by its own statistics"
    layer(x)
    assert not torch.equal(layer.running_mean, before["running_mean"])


def normalise_as(group: dist.ProcessGroup, shape: tuple[int, ...], affine: bool, dtype: torch.dtype) -> torch.Tensor:
    """[2, …] output and input gradient of this rank's half of a batch whose mean is far from 0."""
    torch.manual_seed(0)
    x = (100 + torch.randn(shape, dtype=torch.float64)).to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    layer = nn.Sequential(
        nn.BatchNorm1d(shape[1], affine=affine) if len(shape) == 2 else nn.BatchNorm2d(shape[1], affine=affine)
    )
    layer.to(torch.float64 if dtype == torch.float64 else torch.float32)
    synchronise_batchnorm(layer, group)
    mine = x.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    out = layer(mine)
    assert out.dtype == dtype
    (out.double() ** 3).sum().backward()
    assert mine.grad is not None
    assert mine.grad.is_contiguous(memory_format=torch.channels_last) or len(shape) == 2
    return torch.stack([out.detach(), mine.grad])


def test_kinds_of_input_against_pytorchs_batchnorm_in_float64() -> None:
    cases = [
        ((16, 8), True, torch.float32),
        ((16, 8, 5, 3), True, torch.float32),
        ((16, 8, 5, 3), False, torch.float64),
        ((16, 8, 5, 3), True, torch.bfloat16),
    ]
    for shape, affine, dtype in cases:
        torch.manual_seed(0)
        x = (100 + torch.randn(shape, dtype=torch.float64)).to(dtype).double().requires_grad_()
        layer: nn.Module = nn.BatchNorm1d(shape[1]) if len(shape) == 2 else nn.BatchNorm2d(shape[1])
        out = layer.double()(x)
        (out**3).sum().backward()
        assert x.grad is not None
        ranks = run_ranks(2, normalise_as, shape, affine, dtype)
        got = torch.cat([rank.double() for rank in ranks], dim=1)
        error = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]  # of values up to 40 around 100
        torch.testing.assert_close(got[0], out.detach(), rtol=error, atol=error)
        torch.testing.assert_close(got[1], x.grad, rtol=error, atol=10 * error)


@pytest.mark.gpu
def test_cuda_kernels_against_pytorchs_batchnorm() -> None:
    """One NCCL rank: the way of several, whose statistics are those of its own batch."""
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.BatchNorm2d(16, momentum=0.3)).to(device)
    nn.init.uniform_(plain[0].weight)
    nn.init.uniform_(plain[0].bias)
    ours = copy.deepcopy(plain)
    assert dist.group.WORLD is not None
    synchronise_batchnorm(ours, dist.group.WORLD)
    x = (5 + 3 * torch.randn(8, 16, 9, 9, device=device)).to(memory_format=torch.channels_last)
    found = []
    for layer in (ours, plain):
        own = x.clone().requires_grad_()
        out = layer(own)
        (out**3).sum().backward()
        assert own.grad is not None
        found.append({"out": out.detach(), "x": own.grad, **{n: p.grad for n, p in layer.named_parameters()}})
        found[-1] |= {name: buffer.clone() for name, buffer in layer.named_buffers()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
