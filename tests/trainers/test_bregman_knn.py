"""Votes of the nearest by Bregman divergence, against all divergences and every way to break a tie."""

import math
from itertools import combinations

import pytest
import torch

from trainers.bregman_knn import bregman_votes

SIGMA = 0.9


def by_definition(
    queries: list[list[float]], bank: list[list[float]], labels: list[int], k: int, temperature: float
) -> list[list[float]]:
    """Over all choices of k rows that no other row is nearer than, the mean of their votes."""
    votes = []
    for q in queries:
        divergences = [max(q) - q[max(range(len(b)), key=b.__getitem__)] for b in bank]
        limit = sorted(divergences)[min(k, len(bank)) - 1]
        nearer = [row for row, divergence in enumerate(divergences) if divergence < limit]
        tied = [row for row, divergence in enumerate(divergences) if divergence == limit]
        ways = list(combinations(tied, min(k, len(bank)) - len(nearer)))
        vote = [0.0, 0.0, 0.0]
        for chosen in ways:
            for row in [*nearer, *chosen]:
                similarity = math.exp(-divergences[row] / (2 * SIGMA**2))
                vote[labels[row]] += math.exp(similarity / temperature) / len(ways)
        votes.append(vote)
    return votes


@pytest.mark.parametrize("k", [1, 2, 5, 9, 14, 40])
def test_votes_by_definition(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    bank = torch.randn(14, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (14,), generator=generator)
    found = bregman_votes(queries, bank, labels, 3, [(k, 0.3), (2, 0.1)], sigma=SIGMA)
    expected = torch.tensor(
        by_definition(queries.tolist(), bank.tolist(), labels.tolist(), k, 0.3), dtype=torch.float64
    )
    # Each row's votes are shifted in the exponent by 1/temperature, which ranks and shares do not see.
    torch.testing.assert_close(found[k, 0.3] * math.exp(1 / 0.3), expected, rtol=1e-10, atol=0)
    assert found[2, 0.1].shape == (6, 3)


def test_a_subnetwork_that_won_nothing_is_passed_over() -> None:
    bank = torch.tensor([[0.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    votes = bregman_votes(torch.tensor([[5.0, 0.0, 4.0]]), bank, torch.tensor([1, 1]), 2, [(1, 1.0)], sigma=1.0)
    assert votes[1, 1.0][0, 0] == 0
    assert votes[1, 1.0][0, 1] == pytest.approx(math.exp(math.exp(-5 / 2) - 1))
