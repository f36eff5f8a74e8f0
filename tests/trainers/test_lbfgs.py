"""Batched L-BFGS: problems with known minima, each as exact as alone."""

import pytest
import torch
from torch import Tensor

from trainers.lbfgs import minimise


def quadratics(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices [G, n, n] of very different condition, and their minima [G, n]."""
    generator = torch.Generator().manual_seed(0)
    bases, _ = torch.linalg.qr(torch.randn(4, 12, 12, generator=generator, dtype=torch.float64))
    spread = torch.stack([torch.logspace(0, decades, 12, dtype=torch.float64) for decades in (0, 2, 4, -3)])
    return (bases @ (spread[..., None] * bases.mT)).to(dtype), torch.randn(4, 12, generator=generator).to(dtype)


# What a gradient promises by the diagonal (1e-13 and 1e-6 at the end) is up to the condition, 1e4, times too little.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-2)])
@pytest.mark.parametrize("known", [True, False])
def test_quadratics_end_at_their_minima(dtype: torch.dtype, limit: float, known: bool) -> None:
    matrices, minima = quadratics(dtype)
    evaluated: list[int] = []

    def objective(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        evaluated.append(len(which))
        away = points - minima[which]
        slopes = (matrices[which] @ away[..., None]).squeeze(-1)
        return 0.5 * (away * slopes).sum(1).double(), slopes

    diagonal = matrices.diagonal(dim1=1, dim2=2) if known else torch.ones_like(minima)
    found, done = minimise(objective, torch.zeros_like(minima), diagonal, max_iterations=500)
    assert done.all()
    away = (found - minima).double()
    excess = 0.5 * (away * (matrices.double() @ away[..., None]).squeeze(-1)).sum(1)
    assert excess.max() < limit
    assert evaluated[0] == 4
    assert min(evaluated) < 4, "what is done is not evaluated again"


def test_a_start_at_the_minimum_stays() -> None:
    def objective(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        return points.square().sum(1).double(), 2 * points

    start = torch.zeros(3, 2)
    found, done = minimise(objective, start, torch.ones(3, 2))
    assert torch.equal(found, start)
    assert done.all()


def test_curved_problems_whose_steps_must_be_shortened() -> None:
    """log cosh(a(x − m)): flat far out, so a full step from there goes astray."""
    slopes, minima = torch.tensor([1.0, 30.0, 0.2]).double(), torch.tensor([4.0, -2.0, 0.5]).double()

    def objective(points: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        scaled = slopes[which, None] * (points - minima[which, None])
        values = torch.logaddexp(scaled, -scaled)
        return values.sum(1), slopes[which, None] * scaled.tanh()

    curvature = torch.full((3, 1), 0.01).double()
    _, done = minimise(objective, torch.zeros(3, 1).double(), curvature, max_iterations=2)
    assert not done.all(), "two steps are too few, and it says so"
    found, done = minimise(objective, torch.zeros(3, 1).double(), curvature)
    assert done.all()
    torch.testing.assert_close(found[:, 0], minima, rtol=0, atol=1e-5)
