"""Online k-means against plain loops in float64: assignment, both kinds of mean, seeds, revival, what is logged."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainers.parts.prototypes import LEAST_SHARE, ROWS_REMEMBERED, Prototypes

K, D, C, B = 5, 3, 4, 8


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(B, D, generator=generator, dtype=torch.float64) + 0.5,
            torch.randint(-1, C, (B,), generator=generator),
        )
        for _ in range(count)
    ]


def make(**settings: Any) -> Prototypes:
    return Prototypes(K, D, classes=C, batch_size=B, **settings).double()


class PlainKMeans:
    """The same, centre by centre and row by row, with lists of the rows where a mean of all is asked for."""

    def __init__(self, metric: str, decay: float | None) -> None:
        self.metric, self.decay = metric, decay

    def seed(self, rows: Tensor, labels: Tensor) -> None:
        self.members = [[(self.counted(row), int(label))] for row, label in zip(rows, labels, strict=True)]
        self.centres = [self.counted(row) for row in rows]

    def counted(self, row: Tensor) -> Tensor:
        return row / row.norm() if self.metric == "cosine" else row

    def nearest(self, row: Tensor) -> int:
        row = self.counted(row)
        if self.metric == "cosine":
            return max(range(K), key=lambda k: float(row @ self.centres[k] / self.centres[k].norm()))
        return min(range(K), key=lambda k: float((row - self.centres[k]).norm()))

    def update(self, rows: Tensor, labels: Tensor) -> None:
        got: list[list[Tensor]] = [[] for _ in range(K)]
        for row, label in zip(rows, labels, strict=True):
            k = self.nearest(row)
            got[k].append(self.counted(row))
            self.members[k].append((self.counted(row), int(label)))
        for k, new in enumerate(got):
            if self.decay is None:
                self.centres[k] = torch.stack([row for row, _ in self.members[k]]).mean(0)
            elif new:
                self.centres[k] = self.decay * self.centres[k] + (1 - self.decay) * torch.stack(new).mean(0)

    def share_of(self, k: int, label: int) -> float | None:
        labels = [own for _, own in self.members[k] if own >= 0]
        return labels.count(label) / len(labels) if labels and label >= 0 else None


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("decay", [None, 0.7])
def test_centres_follow_their_rows(metric: str, decay: float | None) -> None:
    prototypes, plain = make(metric=metric, decay=decay, revive=False), PlainKMeans(metric, decay)
    first, *rest = batches(7)
    assert not prototypes.is_ready
    prototypes.update(*first)
    assert prototypes.is_ready
    plain.seed(first[0][-K:], first[1][-K:])
    for rows, labels in rest:
        assert prototypes.assign(rows).tolist() == [plain.nearest(row) for row in rows]
        prototypes.update(rows, labels)
        plain.update(rows, labels)
        torch.testing.assert_close(prototypes.centres, torch.stack(plain.centres), rtol=1e-12, atol=1e-14)
        assert prototypes.counts.tolist() == [len(members) for members in plain.members]
    if decay is not None:
        return
    ids, labels = torch.arange(K).repeat_interleave(C + 1), torch.arange(-1, C).repeat(K)
    shares, known = prototypes.same_class(ids, labels)
    for share, is_known, k, label in zip(shares, known, ids.tolist(), labels.tolist(), strict=True):
        expected = plain.share_of(k, label)
        assert bool(is_known) == (expected is not None)
        if expected is not None:
            assert share.item() == pytest.approx(expected, abs=1e-12)


def test_the_first_centres_are_the_first_rows_that_are_enough() -> None:
    prototypes = make()
    rows, labels = batches(1)[0]
    prototypes.update(rows[:3], labels[:3])
    assert not prototypes.is_ready
    prototypes.update(rows[3:6], labels[3:6])
    assert prototypes.is_ready
    torch.testing.assert_close(prototypes.centres, torch.nn.functional.normalize(rows[1:6]))
    assert prototypes.counts.tolist() == [1] * K
    assert prototypes.occupancy() == 0  # no centre has got a row yet


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_all_centres_begin_anew_from_the_last_rows(metric: str) -> None:
    prototypes = make(metric=metric, reseed_every=3, revive=False)
    for number, (rows, labels) in enumerate(batches(6), start=1):
        prototypes.update(rows, labels)
        kept = rows[-K:] if metric == "euclidean" else torch.nn.functional.normalize(rows[-K:])
        seeded = number in (1, 3, 6)
        assert torch.equal(prototypes.centres, kept) == seeded
        assert (prototypes.counts == 1).all() == seeded
        if seeded:
            shares, known = prototypes.same_class(torch.arange(K), labels[-K:])
            assert torch.equal(known, labels[-K:] >= 0)
            assert (shares[known] == 1).all()


def test_a_dead_centre_becomes_one_of_the_last_rows() -> None:
    updates_to_die = math.ceil(math.log(LEAST_SHARE) / math.log(1 - B / (ROWS_REMEMBERED * K)))
    stays, revived = make(revive=False), make(revive=True)
    for prototypes in (stays, revived):
        prototypes.update(*batches(1)[0])
        prototypes.centres[0] = torch.tensor([-1.0, -1.0, -1.0])  # and no row will be near
    near_others = torch.eye(D, dtype=torch.float64).repeat(3, 1)[:B]
    labels = torch.arange(B) % C
    for prototypes in (stays, revived):
        prototypes.centres[1:4] = torch.eye(D, dtype=torch.float64)
        prototypes.centres[4] = torch.tensor([1.0, 1.0, 1.0])
        for _ in range(updates_to_die - 1):
            prototypes.update(near_others, labels)
        assert not prototypes.is_dead[[1, 2, 3]].any()
        assert prototypes.centres[0, 0] == -1
        prototypes.update(near_others, labels)
    assert stays.is_dead.tolist() == [True, False, False, False, True]
    assert stays.occupancy().item() == pytest.approx(3 / 5)
    assert not revived.is_dead.any()
    last = prototypes.recent
    assert any(torch.equal(revived.centres[0], row) for row in last)
    assert not torch.equal(revived.recent.argmax(1)[[0]], revived.recent.argmax(1)[[4]])  # each has a row of its own
    assert revived.counts[[0, 4]].tolist() == [1, 1]
    assert (revived.counts[1:4] > 1).all()


def test_entropy_of_assignments() -> None:
    prototypes = make()
    assert prototypes.entropy(torch.arange(K)).item() == pytest.approx(1)
    assert prototypes.entropy(torch.zeros(20, dtype=torch.int64)).item() == 0
    half = prototypes.entropy(torch.tensor([0, 1] * 10)).item()
    assert half == pytest.approx(math.log(2) / math.log(K))
    assert prototypes.entropy(torch.tensor([0, 1])).item() == pytest.approx(1)  # two rows cannot do better


def test_uniform_centres_are_used_at_once() -> None:
    torch.manual_seed(0)
    prototypes = Prototypes(1000, D, classes=0, batch_size=B, metric="euclidean", uniform=True)
    assert prototypes.is_ready
    assert 0 <= prototypes.centres.min() < 0.01
    assert 0.99 < prototypes.centres.max() < 1
    before = prototypes.centres.clone()
    row = torch.full((1, D), 9.0)
    k = int((before - row).norm(dim=1).argmin())
    prototypes.update(row, torch.tensor([-1]))
    torch.testing.assert_close(prototypes.centres[k], (before[k] + 9) / 2)  # the first centre counts as one row
    assert (prototypes.centres != before).any(1).sum() == 1


def test_without_classes_nothing_is_said_of_them() -> None:
    prototypes = Prototypes(K, D, classes=0, batch_size=B)
    for rows, labels in batches(3):
        prototypes.update(rows.float(), labels)
    _, known = prototypes.same_class(torch.arange(K), torch.zeros(K, dtype=torch.int64))
    assert not known.any()


def test_a_restored_one_goes_on_as_if_nothing_had_happened() -> None:
    whole, restored = make(reseed_every=4), make(reseed_every=4)
    first, second, *rest = batches(9)
    whole.update(*first)
    whole.update(*second)
    restored.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    assert restored.is_ready
    for rows, labels in rest:
        whole.update(rows, labels)
        restored.update(rows, labels)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name
