"""kNN of a bank that comes in parts and of queries shared by ranks, against one search and scikit-learn."""

import pytest
import torch
import torch.distributed as dist
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

import trainers.knn
from tests.distributed import run_ranks
from trainers.knn import knn_rankings, knn_votes, search

CPU = torch.device("cpu")
GRID = [(1, 0.1), (7, 0.07), (40, 0.5)]


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (500,), generator=generator)
    centres = torch.randn(7, 24, generator=generator)
    bank = centres[labels] + torch.randn(500, 24, generator=generator)
    queries = centres[torch.randint(7, (61,), generator=generator)] + torch.randn(61, 24, generator=generator)
    return queries, bank, labels


def rankings(group: dist.ProcessGroup | None = None) -> dict[tuple[int, float], Tensor]:
    queries, bank, labels = data()
    return knn_rankings(queries, bank, labels, classes=7, settings=GRID, device=CPU, group=group)


@pytest.mark.parametrize("rows", [1, 33, 499, 500])
def test_a_bank_in_parts_gives_the_neighbours_of_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, bank, _ = (values.double() if values.is_floating_point() else values for values in data())
    unit = bank / bank.norm(dim=1, keepdim=True)
    full = queries / queries.norm(dim=1, keepdim=True) @ unit.T
    monkeypatch.setattr(trainers.knn, "BANK_BYTES", rows * 24 * 8)
    cosine, places = search(queries, bank, 40)
    expected, order = full.sort(dim=1, descending=True)
    torch.testing.assert_close(cosine, expected[:, :40], rtol=1e-12, atol=1e-12)
    assert torch.equal(places, order[:, :40])


def test_rankings_are_the_votes_in_order_and_scikit_learns_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainers.knn, "VOTES_AT_A_TIME", 7 * len(GRID) * 10)  # ten queries at a time
    queries, bank, labels = data()
    found = rankings()
    votes = knn_votes(queries, bank, labels, 7, GRID)
    for setting in GRID:
        assert torch.equal(found[setting], votes[setting].topk(5, dim=1).indices)
    reference = KNeighborsClassifier(7, weights=lambda d: torch.tensor(-d / 0.07).exp().numpy(), metric="cosine")
    expected = reference.fit(bank.numpy(), labels).predict(queries.numpy())
    assert found[7, 0.07][:, 0].tolist() == expected.tolist()


def test_shuffled_labels_give_chance() -> None:
    queries, bank, labels = data()
    truth = rankings()[7, 0.07][:, 0]  # as good as the classes that queries were drawn from
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    found = knn_rankings(queries, bank, shuffled, classes=7, settings=GRID, device=CPU)
    for setting in GRID:
        assert (found[setting][:, 0] == truth).double().mean() < 0.35, "a seventh, of 61 queries"


def test_settings_named_twice_change_nothing() -> None:
    queries, bank, labels = data()
    twice = knn_rankings(queries, bank, labels, classes=7, settings=[GRID[0], *GRID], device=CPU)
    assert all(torch.equal(twice[setting], found) for setting, found in rankings().items())


def test_three_ranks_answer_as_one() -> None:
    alone = rankings()
    for together in run_ranks(3, rankings):
        assert all(torch.equal(together[setting], alone[setting]) for setting in GRID)
