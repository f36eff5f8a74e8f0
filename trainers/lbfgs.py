"""L-BFGS for many smooth convex problems of one shape at once, each with its own steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

# Weights [g, …] of the problems ``which`` [g] -> objectives [g] float64 and gradients [g, …].
Objective = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

HISTORY = 10
SUFFICIENT = 1e-4  # of the decrease that the slope promises (Armijo's rule)


def minimise(
    objective: Objective,
    start: Tensor,
    curvature: Tensor,
    *,
    tolerance: float | None = None,
    max_iterations: int = 300,
) -> tuple[Tensor, Tensor]:
    """Minimise G convex problems; those that are done are evaluated no more.

    Args:
        objective: of some of the problems at once.
        start: [G, …], where to begin.
        curvature: broadcastable to ``start``, about the diagonal of each Hessian, above 0: the metric of the first
            step and of what the history does not know (Nocedal & Wright, 2006, section 7.2).
        tolerance: a problem is done once its gradient g promises less than this, gᵀ diag(curvature)⁻¹ g / 2, of 0.01 +
            its objective; None: 1e-6, or 1e-13 in float64.
        max_iterations: of each problem.

    Returns:
        The best points found [G, …]; and which problems are done, [G] bool.
    """
    precise = start.dtype == torch.float64
    tolerance = tolerance if tolerance is not None else 1e-13 if precise else 1e-6
    noise = 1e-14 if precise else 1e-7  # of the objective, relative: a decrease below that cannot be seen
    result, done = start.clone(), torch.zeros(len(start), dtype=torch.bool, device=start.device)
    which = torch.arange(len(start), device=start.device)
    weights = start.clone()
    inverse = (1 / curvature).expand_as(start)
    losses, gradient = objective(weights, which)
    history: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=HISTORY)  # steps, changes of gradient, 1/their product
    for _ in range(max_iterations):
        promise = _dot(gradient, inverse * gradient) / 2
        active = ~(promise <= tolerance * (0.01 + losses.abs()))  # so that NaN is never done
        if not active.all():
            result[which] = weights
            done[which] = ~active
            if not active.any():
                return result, done
            which, weights, gradient, inverse, losses = (x[active] for x in (which, weights, gradient, inverse, losses))
            history = deque((tuple(x[active] for x in past) for past in history), maxlen=HISTORY)  # type: ignore[misc]
        direction = _direction(gradient, inverse, history)
        slope = _dot(gradient, direction)
        uphill = slope >= 0  # only by rounding: the history of that problem is of no use any more
        if uphill.any():
            direction = torch.where(_like(uphill, direction), -inverse * gradient, direction)
            slope = _dot(gradient, direction)
        step = torch.ones_like(losses)
        searching = torch.ones_like(uphill)
        new_weights, new_losses, new_gradient = weights.clone(), losses.clone(), gradient.clone()
        for _ in range(30):
            tried = weights[searching] + _like(step[searching], direction) * direction[searching]
            found, slopes = objective(tried, which[searching])
            new_weights[searching], new_losses[searching], new_gradient[searching] = tried, found, slopes
            enough = losses + SUFFICIENT * step * slope + noise * losses.abs()
            searching = new_losses > enough
            if not searching.any():
                break
            step = torch.where(searching, step / 2, step)
        # Where no step gives a decrease that float arithmetic can show, the point is as good as it gets: it stays, and
        # no gradient is left that would ask for more.
        stuck = _like(searching, weights)
        moved, turned = new_weights - weights, new_gradient - gradient
        product = _dot(moved, turned)
        usable = (product > 1e-12 * _dot(moved, moved).sqrt() * _dot(turned, turned).sqrt()) & ~searching
        history.append((moved, turned, torch.where(usable, 1 / product, 0)))
        weights, losses = torch.where(stuck, weights, new_weights), torch.where(searching, losses, new_losses)
        gradient = torch.where(stuck, 0, new_gradient)
    result[which] = weights
    return result, done


def _direction(gradient: Tensor, inverse: Tensor, history: deque[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """−H⁻¹ g by the two-loop recursion (Nocedal & Wright, 2006, algorithm 7.4)."""
    q, shares = gradient.clone(), []
    for moved, turned, rho in reversed(history):
        share = rho * _dot(moved, q)
        q -= _like(share, q) * turned
        shares.append(share)
    r = inverse * q
    if history:
        moved, turned, rho = history[-1]
        scale = 1 / (rho * _dot(turned, inverse * turned))
        r *= _like(torch.where(rho > 0, scale, 1), r)
    for (moved, turned, rho), share in zip(history, reversed(shares), strict=True):
        r += _like(share - rho * _dot(turned, r), r) * moved
    return -r


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """[g], float64."""
    return (x * y).flatten(1).sum(1, dtype=torch.float64)


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    """[g] -> [g, 1, …], in the dtype of ``tensor`` unless bool."""
    shaped = values.view(-1, *[1] * (tensor.dim() - 1))
    return shaped if values.dtype == torch.bool else shaped.to(tensor.dtype)
