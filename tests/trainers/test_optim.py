"""LARS and the schedules against their formulas, written out plainly in float64."""

import math

import pytest
import torch
from torch import nn

from trainers.encoders import EncoderConfig, build_encoder
from trainers.optim import (
    LARS,
    OptimConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    parameter_groups,
)


def plain_lars(
    w: torch.Tensor,
    gradients: list[torch.Tensor],
    lrs: list[float],
    wd: float,
    m: float,
    trust: float,
    adapt: bool,
) -> torch.Tensor:
    w, v = w.clone(), torch.zeros_like(w)
    for g, lr in zip(gradients, lrs, strict=True):
        d = g + wd * w
        ratio = 1.0
        if adapt and w.norm() > 0 and d.norm() > 0:
            ratio = trust * (w.norm() / d.norm()).item()
        v = m * v + lr * ratio * d
        w = w - v
    return w


@pytest.mark.parametrize("adapt", [True, False])
def test_lars_follows_the_formula(adapt: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 3, 3), (5,), (7, 2), (3,)]
    starts = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    starts[1].zero_()  # a zero-initialised tensor
    gradients = [[torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(6)]
    for step in gradients:
        step[3].zero_()  # a tensor whose gradient stays zero
    lrs = [0.1, 0.2, 0.3, 0.3, 0.2, 0.1]
    params = [nn.Parameter(w.clone()) for w in starts]
    optimizer = LARS(params, lr=1.0, momentum=0.9, weight_decay=0.01, trust_coefficient=0.02, adapt=adapt)
    for step, lr in zip(gradients, lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for i, p in enumerate(params):
        expected = plain_lars(starts[i], [s[i] for s in gradients], lrs, 0.01, 0.9, 0.02, adapt)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)
    assert params[1].detach().norm() > 0, "a zero tensor must be able to move"


def test_lars_survives_zero_over_zero_and_missing_gradients() -> None:
    dead, unused = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    dead.grad = torch.zeros(3)
    LARS([dead, unused], lr=0.1).step()
    assert torch.equal(dead.detach(), torch.zeros(3))
    assert torch.equal(unused.detach(), torch.ones(3))


def test_groups_go_by_module_type_not_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn_like_name = nn.Linear(3, 3)
            self.plain = nn.BatchNorm1d(3)
            self.more = nn.Sequential(nn.LayerNorm(3), nn.Conv2d(1, 1, 1))

    module = Named()
    decayed, others = parameter_groups(module, 0.1)
    assert {id(p) for p in decayed["params"]} == {id(module.bn_like_name.weight), id(module.more[1].weight)}
    assert len(others["params"]) == 6
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert (decayed["adapt"], others["adapt"]) == (True, False)


@pytest.mark.parametrize("arch", ["resnet8x4", "resnet18", "resnet50"])
def test_every_parameter_of_an_encoder_is_in_one_group(arch: str) -> None:
    encoder = build_encoder(EncoderConfig(arch=arch), 32)
    decayed, others = parameter_groups(encoder, 1e-4)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in others["params"])
    counted = [id(p) for group in (decayed, others) for p in group["params"]]
    assert sorted(counted) == sorted(id(p) for p in encoder.parameters())


@pytest.mark.parametrize("name", ["lars", "sgd", "adam", "adamw"])
def test_every_optimizer_descends(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    x, y = torch.randn(64, 5), torch.randint(3, (64,))
    optimizer = build_optimizer(OptimConfig(name=name), model, lr=1.0 if name == "lars" else 0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]


def test_lr_scaling_rules() -> None:
    for rule, factor in (("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)):
        assert OptimConfig(lr=0.3, lr_scaling=rule).scaled_lr(1024) == pytest.approx(0.3 * factor)


def test_cosine_against_pytorch() -> None:
    warmup, total, peak = 5, 45, 0.7
    lr = build_schedule(ScheduleConfig(warmup_epochs=0.5), peak, 10, total)
    assert [lr(s) for s in range(warmup)] == pytest.approx([peak * (s + 1) / warmup for s in range(warmup)])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup)
    for step in range(warmup, total):
        assert lr(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()
    assert lr(total) == pytest.approx(0, abs=1e-12)
    assert lr(total + 100) == pytest.approx(0, abs=1e-12), "past its end a schedule stays at its end"


def test_step_and_constant() -> None:
    step = build_schedule(ScheduleConfig(name="step", warmup_epochs=0, milestones=(0.5, 0.9)), 1.0, 10, 100)
    assert [step(s) for s in (0, 49, 50, 89, 90, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    constant = build_schedule(ScheduleConfig(name="constant", warmup_epochs=1), 0.2, 4, 100)
    assert [constant(s) for s in (0, 3, 4, 99)] == pytest.approx([0.05, 0.2, 0.2, 0.2])
    final = build_schedule(ScheduleConfig(warmup_epochs=0, final=0.1), 1.0, 1, 10)
    assert final(10) == pytest.approx(0.1)
    assert final(5) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_epochs=3 is 30 steps, but the run has only 20"):
        build_schedule(ScheduleConfig(warmup_epochs=3), 1.0, 10, 20)
