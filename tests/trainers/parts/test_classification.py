"""Losses of classifiers, where not every image has a label and labels are spread unevenly over ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import run_ranks
from trainers.parts.classification import divergence, labelled_accuracy, labelled_cross_entropy
from trainers.parts.teacher_head import TeacherHead

N, C, D = 12, 5, 4
LABELS = torch.tensor([3, -1, -1, 0, -1, -1, 1, 4, 2, 2, -1, 0])  # of the halves: 2 and 5


def logits_of(seed: int) -> Tensor:
    return 2 * torch.randn(N, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cross_entropy(logits: Tensor, labels: list[int]) -> float:
    terms = [
        math.log(sum(math.exp(x) for x in row)) - row[label]
        for row, label in zip(logits.tolist(), labels, strict=True)
        if label >= 0
    ]
    return sum(terms) / len(terms)


def kl(logits: Tensor, taught: Tensor, temperature: float) -> float:
    total = 0.0
    for ours, theirs in zip(logits.tolist(), taught.tolist(), strict=True):
        q, p = ([math.exp(x / temperature) for x in row] for row in (ours, theirs))
        total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(logits)


def test_losses_are_their_formulas() -> None:
    logits, taught = logits_of(0), logits_of(1)
    assert labelled_cross_entropy(logits, LABELS, None).item() == pytest.approx(
        cross_entropy(logits, LABELS.tolist()), rel=1e-12
    )
    for temperature in (1.0, 4.0):
        found = divergence(logits, taught, temperature, None).item()
        assert found == pytest.approx(kl(logits, taught, temperature), rel=1e-12)
    assert divergence(logits, logits, 4.0, None).item() == pytest.approx(0, abs=1e-14)


def test_gradients_are_those_of_finite_differences() -> None:
    logits, taught = logits_of(0).requires_grad_(), logits_of(1)
    assert torch.autograd.gradcheck(lambda x: labelled_cross_entropy(x, LABELS, None), logits)
    assert torch.autograd.gradcheck(lambda x: divergence(x, taught, 4.0, None), logits)


def test_without_any_label_there_is_nothing_to_learn() -> None:
    logits, none = logits_of(0).requires_grad_(), torch.full((N,), -1)
    loss = labelled_cross_entropy(logits, none, None)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert labelled_accuracy(logits, none).item() == 0


def test_accuracy_counts_labelled_rows() -> None:
    logits = torch.nn.functional.one_hot(LABELS.clamp_min(0), C).double()
    logits[8] = torch.tensor([9.0, 0, 0, 0, 0])
    assert labelled_accuracy(logits, LABELS).item() == pytest.approx(6 / 7)


def test_the_head_learns_by_sgd_with_momentum_of_its_own() -> None:
    """Against PyTorch's modules and optimizer."""
    torch.manual_seed(0)
    head = TeacherHead(D, 6, C, lr=0.1, total_steps=5).double()
    theirs = torch.nn.Sequential(torch.nn.Linear(D, 6), torch.nn.ReLU(), torch.nn.Linear(6, C)).double()
    for name, parameter in zip(("weight0", "bias0", "weight1", "bias1"), theirs.parameters(), strict=True):
        parameter.data.copy_(head.get_buffer(name))
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    features = torch.randn(N, D, dtype=torch.float64)
    labelled = LABELS >= 0
    for _ in range(5):
        head.fit(features, LABELS, None)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(features)[labelled], LABELS[labelled]).backward()
        optimizer.step()
        schedule.step()
    assert torch.allclose(head(features), theirs(features), rtol=1e-12)
    assert not list(head.parameters())
    assert not head(features).requires_grad
    again = TeacherHead(D, 6, C, lr=0.1, total_steps=5).double()
    again.load_state_dict(head.state_dict())
    assert again._step == 5
    assert torch.equal(again(features), head(features))


def of_a_rank(group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Losses and gradients of this rank's share, and the head that all have trained."""
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    mine = slice(rank * N // ranks, (rank + 1) * N // ranks)
    logits = logits_of(0)[mine].requires_grad_()
    losses = [labelled_cross_entropy(logits, LABELS[mine], group), divergence(logits, logits_of(1)[mine], 4.0, group)]
    (losses[0] + losses[1]).backward()
    torch.manual_seed(0)
    head = TeacherHead(D, 6, C, lr=0.1, total_steps=5).double()
    for seed in range(3):
        features = torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        head.fit(features[mine], LABELS[mine], group)
    assert logits.grad is not None
    return {"losses": torch.stack(losses).detach(), "gradient": logits.grad / ranks, **head.state_dict()}


def test_ranks_agree_however_labels_are_spread() -> None:
    one, two = of_a_rank(None), run_ranks(2, of_a_rank)
    assert torch.allclose(torch.cat([result.pop("gradient") for result in two]), one.pop("gradient"), rtol=1e-12)
    for name, value in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        assert torch.allclose(two[0][name], value, rtol=1e-10), name
