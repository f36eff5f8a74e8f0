"""MINE on Gaussians whose mutual information is known, one step of it against the formula, and on ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed import run_ranks
from trainers.engine import Ranks
from trainers.mine import Mine
from trainers.monitors import Monitor, MonitorConfig
from trainers.step import StepResult

CPU = torch.device("cpu")


def pairs(rows: int, width: int, correlation: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x, noise = torch.randn(2, rows, width, generator=generator)
    return x, correlation * x + math.sqrt(1 - correlation**2) * noise


@pytest.mark.parametrize(("correlation", "shortfall"), [(0.9, 0.06), (0.6, 0.04), (0.0, 0.01)])
def test_finds_what_gaussians_tell_of_each_other(correlation: float, shortfall: float) -> None:
    torch.manual_seed(0)
    mine = Mine(2, CPU, width=64, lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    estimates = [mine.fit(*pairs(512, 2, correlation, generator), None).item() for _ in range(400)]
    exact = -math.log(1 - correlation**2)  # of two independent pairs of coordinates
    found = sum(estimates[-100:]) / 100
    assert exact - shortfall * max(1.0, exact) < found < exact + 0.02


def test_a_step_is_the_formula() -> None:
    torch.manual_seed(0)
    mine = Mine(3, CPU, width=5, lr=0.01, rate=0.2)
    reference = nn.Sequential(nn.Linear(6, 5), nn.ELU(), nn.Linear(5, 5), nn.ELU(), nn.Linear(5, 1, bias=False))
    reference.load_state_dict(mine.network.state_dict())
    optimizer = torch.optim.Adam(reference.parameters(), 0.01)
    generator, average = torch.Generator().manual_seed(1), None
    for _ in range(4):
        x, y = pairs(4, 3, 0.9, generator)
        others = torch.stack([y[1], y[2], y[3], y[0]])
        joint = reference(torch.cat([x, y], 1)).mean()
        exponential = reference(torch.cat([x, others], 1)).exp().mean()
        average = exponential.item() if average is None else 0.8 * average + 0.2 * exponential.item()
        optimizer.zero_grad()
        (exponential / average - joint).backward()
        assert mine.fit(x, y, None).item() == pytest.approx((joint - exponential.log()).item(), abs=1e-6)
        optimizer.step()
        assert mine.log_average.item() == pytest.approx(math.log(average), abs=1e-6)
    for ours, theirs in zip(mine.network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_stays_finite_where_exponentials_would_not() -> None:
    torch.manual_seed(0)
    mine = Mine(2, CPU, width=8)
    with torch.no_grad():
        mine.network[-1].weight *= 1e4
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        assert math.isfinite(mine.fit(*pairs(16, 2, 0.9, generator), None).item())
    assert all(torch.isfinite(p).all() for p in mine.network.parameters())


def observe(group: dist.ProcessGroup | None, steps: int) -> dict[str, torch.Tensor]:
    """A monitor of this rank's share of some batches: its last estimate and all of its state."""
    torch.manual_seed(0)
    world_size = dist.get_world_size()
    ranks = Ranks(dist.get_rank(), world_size, CPU, group if world_size > 1 else None, None)
    monitor = a_monitor(ranks)
    monitor.mine.double()  # Adam makes steps of float32's noise where a gradient is nearly zero
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        found = monitor.observe(a_result(pairs(8, 6, 0.8, generator), ranks))
    return monitor.state()["mine"] | {"estimate": found["mine/mutual_information"]}


def a_monitor(ranks: Ranks, mine: bool = True) -> Monitor:
    encoder = nn.Identity()
    encoder.features = 6
    return Monitor(MonitorConfig(mine=mine), encoder, None, None, size=8, batch_size=8, ranks=ranks)


def a_result(views: tuple[torch.Tensor, ...], ranks: Ranks) -> StepResult:
    mine = torch.stack([view.chunk(ranks.world_size)[ranks.rank] for view in views])
    return StepResult({}, {"features": mine}, None)


def test_ranks_agree_and_find_what_one_process_finds() -> None:
    [whole] = run_ranks(1, observe, 3)
    parts = run_ranks(2, observe, 3)
    assert any("exp_avg" in name for name in whole)
    for name, value in whole.items():
        assert torch.equal(parts[0][name], parts[1][name]), name
        torch.testing.assert_close(parts[0][name], value, rtol=1e-9, atol=1e-12)


def test_goes_on_to_the_bit_from_its_state() -> None:
    ranks = Ranks(0, 1, CPU, None, None)
    torch.manual_seed(0)
    whole, first, second = (a_monitor(ranks) for _ in range(3))
    first.load(whole.state())
    batches = [a_result(pairs(8, 6, 0.8, torch.Generator().manual_seed(step)), ranks) for step in range(6)]
    for batch in batches[:3]:
        whole.observe(batch)
        first.observe(batch)
    saved = {name: {key: value.clone() for key, value in part.items()} for name, part in first.state().items()}
    second.load(saved | {"probe": {}, "method": {}})
    for batch in batches[3:]:
        assert torch.equal(*(m.observe(batch)["mine/mutual_information"] for m in (whole, second)))
    for name, value in whole.state()["mine"].items():
        assert torch.equal(value, second.state()["mine"][name]), name


def test_is_off_unless_asked_for_and_refuses_what_it_cannot_compare() -> None:
    ranks = Ranks(0, 1, CPU, None, None)
    off = a_monitor(ranks, mine=MonitorConfig().mine)
    assert off.observe(a_result((torch.zeros(4, 6),) * 2, ranks)) == {}
    assert off.state() == {}
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        a_monitor(ranks).observe(a_result((torch.zeros(1, 6),) * 2, ranks))
