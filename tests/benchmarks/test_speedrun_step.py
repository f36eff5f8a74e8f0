"""The step of the speedrun against plain formulas and the optimizers of PyTorch: loss, update, average, schedules."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speedrun.network import batch_loss
from benchmarks.speedrun.recipe import Recipe
from benchmarks.speedrun.trainer import Trainer
from benchmarks.speedrun.update import Average, Update, average_weight
from tests.benchmarks.stripes import CPU, TINY, stripes
from trainers.optim import LARS


def exact_loss(z: Tensor, loss: str, temperature: float) -> Tensor:
    """Row by row, in float64."""
    z = F.normalize(z.double())
    count, total = len(z), z.new_zeros(())
    for row in range(count):
        logits = z @ z[row] / temperature
        positive = (row + count // 2) % count
        negatives = [j for j in range(count) if j not in (row, positive)]
        kept = negatives if loss == "decoupled" else [*negatives, positive]
        total = total + logits[kept].logsumexp(0) - logits[positive]
    return total / count


@pytest.mark.parametrize("loss", ["decoupled", "ntxent"])
@pytest.mark.parametrize("fused", [True, False])
def test_losses_and_gradients_are_those_of_the_formula(loss: str, fused: bool) -> None:
    z = torch.randn(12, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    found = batch_loss(z, replace(TINY, loss=loss, fused_loss=fused))
    exact = exact_loss(z, loss, TINY.temperature)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, z)[0] for value in (found, exact)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_step_descends_the_loss_of_its_views_by_sgd() -> None:
    trainer = Trainer(stripes(), TINY, CPU, seed=3)
    before, started = copy.deepcopy(trainer.network), copy.deepcopy(trainer.averaged)
    trainer.rows.copy_(torch.arange(8) + 5)
    trainer.lr.fill_(0.1)
    trainer.weight.fill_(0.25)
    state = torch.get_rng_state()
    views = trainer.views(8)
    torch.set_rng_state(state)
    trainer.made[8]()

    exact = exact_loss(before(views), TINY.loss, TINY.temperature)
    torch.testing.assert_close(trainer.loss_sum.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    exact.backward()
    decayed = [p for p in before.parameters() if p.ndim > 1]
    plain = [p for p in before.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": TINY.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    torch.optim.SGD(groups, lr=0.1, momentum=TINY.momentum, nesterov=True).step()
    for found, expected in zip(trainer.network.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # The average has come a quarter of the way, in weights and in running statistics.
    for name, value in trainer.averaged.state_dict().items():
        if value.is_floating_point():
            expected = 0.75 * started.state_dict()[name] + 0.25 * trainer.network.state_dict()[name]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_updates_are_those_of_the_optimizers_over_several_steps(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
    twin = copy.deepcopy(net)
    recipe = replace(TINY, optimizer=name, weight_decay=0.01)
    lr = torch.tensor(0.0)
    update = Update(net, recipe, lr)
    weights, others = [twin[0].weight], [twin[1].weight, twin[1].bias]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    if name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True)
    else:
        optimizer = LARS([groups[0] | {"adapt": True}, groups[1] | {"adapt": False}], lr=1.0)
    for step in range(4):
        gradients = [torch.randn_like(p) for p in net.parameters()]
        for parameter, gradient in zip(twin.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        rate = 0.3 / (step + 1)
        lr.fill_(rate)
        for group in optimizer.param_groups:
            group["lr"] = rate
        update(gradients)
        optimizer.step()
    for found, expected in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_the_average_is_a_mean_at_first_and_exponential_later() -> None:
    source, copied, weight = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), torch.zeros(())
    average = Average(source, copied, weight)
    values = [3.0, 5.0, 10.0, 2.0]
    for step, value in enumerate(values):
        nn.init.constant_(source.weight, value)
        weight.fill_(average_weight(step, 30, 0.1))  # a horizon of three steps
        average()
        if step == 2:
            assert copied.weight.item() == pytest.approx(6.0)
    assert copied.weight.item() == pytest.approx(6.0 + (2.0 - 6.0) / 3)


def test_a_seed_can_be_run_again_and_seeds_differ() -> None:
    trainer = Trainer(stripes(), TINY, CPU)

    def first_epoch(seed: int) -> list[float]:
        trainer.reset(seed)
        return [trainer.epoch(), *trainer.network.projector[3].weight.flatten()[:4].tolist()]

    once = first_epoch(1)
    assert first_epoch(1) == once
    assert first_epoch(2) != once


@pytest.mark.gpu
def test_a_graph_replays_new_batches_rates_and_draws() -> None:
    device = torch.device("cuda")
    trainer = Trainer(stripes().to(device), replace(TINY, compile=False), device)
    trainer.prepare()

    def losses(seed: int) -> list[float]:
        trainer.reset(seed)
        return [trainer.epoch(), trainer.epoch()]

    once = losses(1)
    assert all(map(math.isfinite, once))
    assert once[0] != once[1]
    assert losses(1) == pytest.approx(once, rel=1e-2)  # sums on a GPU come in any order
    assert losses(2) != pytest.approx(once, rel=1e-4)


def test_the_sizes_of_the_views_change_when_the_recipe_says() -> None:
    recipe = Recipe(sizes=((0.0, 24), (0.6, 32)))
    assert [recipe.size_at(step / 10) for step in range(10)] == [24] * 6 + [32] * 4
    trainer = Trainer(stripes(), TINY, CPU)  # 4 steps an epoch, two epochs
    seen: list[int] = []
    for side in trainer.made:
        trainer.made[side] = lambda side=side: seen.append(side)  # type: ignore[misc]
    trainer.epoch()
    trainer.epoch()
    assert seen == [8] * 4 + [12] * 4
    assert trainer.done


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    recipe = replace(TINY, lr=0.1, batch=512, warmup=0.2)
    rates = [recipe.lr_at(step, 10) for step in range(10)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.2])  # twice the batch of the rule
    assert rates[6] == pytest.approx(0.2 * 0.5 * (1 + math.cos(math.pi * 4 / 8)))
    assert 0 < rates[9] < 0.01
