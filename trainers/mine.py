"""How much the features of two views of an image tell of each other, by a network trained to find out (MINE,
Belghazi et al., arXiv:1801.04062)."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.ranks import gather_rows, group_or_none
from trainers.fitting import fitted_state, load_fitted


class Mine(nn.Module):
    """A statistics network T(x, y), trained to tell pairs of one image from pairs of two.

    E[T(pair)] - log E[exp T(others)] is a lower bound of the mutual information (Donsker and Varadhan), and is what
    ``fit`` returns of its batch; so it is noisy, cannot exceed the log of the rows much, and is low while T learns.
    """

    log_average: Tensor  # [] the log of the moving average of E[exp T(others)], by which the gradient is corrected

    def __init__(
        self, features: int, device: torch.device, *, width: int = 512, lr: float = 5e-4, rate: float = 0.05
    ) -> None:
        """``rate``: what a batch contributes to the moving average."""
        super().__init__()
        self.network = nn.Sequential(
            *(nn.Linear(2 * features, width), nn.ELU(), nn.Linear(width, width), nn.ELU()),
            nn.Linear(width, 1, bias=False),  # a constant cancels out of the bound
        )
        self.rate = rate
        self.register_buffer("log_average", torch.tensor(-math.inf))
        self.to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr, fused=True)

    def fit(self, x: Tensor, y: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        """One step on rows x and y [N, d] that belong together, of all ranks; returns the estimate in nats.

        Each x is also paired with the y of the next row, the last of a rank with the next rank's first.

        Raises:
            ValueError: a single row, which has no other to be told from.
        """
        group = group_or_none(group)
        rows = len(x) * (1 if group is None else dist.get_world_size(group))
        if rows < 2:
            raise ValueError("MINE tells pairs of one image from pairs of two: it needs at least 2 rows, got 1")
        x, y = (rows_of.detach().to(self.log_average.dtype) for rows_of in (x, y))
        others = torch.cat([y[1:], _first_of_next_rank(y, group)])
        of_pairs, of_others = self.network(torch.cat([torch.cat([x, y], 1), torch.cat([x, others], 1)])).chunk(2)
        with torch.no_grad():
            log_sum, total = of_others.logsumexp(0), of_pairs.sum(0)
            if group is not None:
                log_sum = gather_rows(log_sum, group).logsumexp(0, keepdim=True)
                dist.all_reduce(total, group=group)
            log_mean = log_sum[0] - math.log(rows)
            moved = torch.logaddexp(self.log_average + math.log(1 - self.rate), log_mean + math.log(self.rate))
            self.log_average.copy_(torch.where(self.log_average.isinf(), log_mean, moved))
        # The average holds this batch's share already, so no exponential is above rows / rate.
        loss = ((of_others - self.log_average).exp().sum() - of_pairs.sum()) / rows
        self.optimizer.zero_grad()
        loss.backward()
        if group is not None:
            for gradient in [p.grad for p in self.network.parameters() if p.grad is not None]:
                dist.all_reduce(gradient, group=group)
        self.optimizer.step()
        return total[0] / rows - log_mean

    def state(self) -> dict[str, Tensor]:
        return fitted_state(self, self.optimizer)

    def load(self, tensors: dict[str, Tensor]) -> None:
        load_fitted(self, self.optimizer, tensors)


def _first_of_next_rank(rows: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[1, d]; alone, the own first."""
    if group is None:
        return rows[:1]
    following = (dist.get_rank(group) + 1) % dist.get_world_size(group)
    return gather_rows(rows[:1], group)[following, None]
