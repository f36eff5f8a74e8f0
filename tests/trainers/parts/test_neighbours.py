"""The loss of neighbours against predictions, from its formula; and the means that are logged."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.batch import ViewBatch
from tests.distributed import run_ranks
from trainers.parts.neighbours import class_labels, masked_means, neighbour_loss

M, D, TEMPERATURE = 6, 5, 0.3


def rows(count: int = M) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(2, count, D, generator=generator, dtype=torch.float64) * 3
    predictions = anchors.flip(0) + torch.randn(2, count, D, generator=generator, dtype=torch.float64) * 2
    return anchors, predictions


def by_formula(anchors: Tensor, predictions: Tensor) -> float:
    """Number by number: row i is the neighbour of one view, the softmax is over all predictions of the other."""
    total = 0.0
    for view in (0, 1):
        for i in range(anchors.shape[1]):
            terms = []
            for j in range(anchors.shape[1]):
                a, p = anchors[view, i].tolist(), predictions[1 - view, j].tolist()
                product = sum(x * y for x, y in zip(a, p, strict=True))
                terms.append(math.exp(product / math.hypot(*a) / math.hypot(*p) / TEMPERATURE))
            total -= math.log(terms[i] / sum(terms))
    return total / (2 * anchors.shape[1])


def test_the_loss_is_that_of_the_formula() -> None:
    anchors, predictions = rows()
    loss, hits = neighbour_loss(anchors, predictions, temperature=TEMPERATURE)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(by_formula(anchors, predictions), rel=1e-12)
    unit_a, unit_p = (torch.nn.functional.normalize(x, dim=2) for x in (anchors, predictions))
    expected = [(unit_a[v] @ unit_p[1 - v].T).argmax(1) == torch.arange(M) for v in (0, 1)]
    assert torch.equal(hits, torch.cat(expected))
    assert 0 < hits.sum() < 2 * M


def test_the_gradient_is_that_of_finite_differences() -> None:
    anchors, predictions = rows()
    predictions.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: neighbour_loss(anchors, p, temperature=TEMPERATURE)[0], (predictions,))


def test_no_gradient_flows_to_the_neighbours() -> None:
    anchors, predictions = (x.requires_grad_() for x in rows())
    neighbour_loss(anchors, predictions, temperature=TEMPERATURE)[0].backward()
    assert anchors.grad is None
    assert predictions.grad is not None


def test_half_precision_is_computed_in_single() -> None:
    anchors, predictions = (x.bfloat16() for x in rows())
    loss, _ = neighbour_loss(anchors, predictions, temperature=TEMPERATURE)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_formula(anchors.double(), predictions.double()), rel=1e-5)


def on_two_ranks(group: dist.ProcessGroup) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    mine = slice(dist.get_rank(group) * M // 2, (dist.get_rank(group) + 1) * M // 2)
    anchors, predictions = (x[:, mine] for x in rows())
    predictions = predictions.clone().requires_grad_()
    loss, _ = neighbour_loss(anchors, predictions, temperature=TEMPERATURE, group=group)
    (2 * loss).backward()
    numbers = torch.arange(M)[mine]
    means = masked_means({"even": (numbers, numbers % 2 == 0), "none": (numbers, numbers > M)}, group)
    return loss.detach(), predictions.grad, means


def test_two_ranks_find_the_global_mean_and_twice_its_gradient() -> None:
    anchors, predictions = rows()
    predictions.requires_grad_()
    expected, _ = neighbour_loss(anchors, predictions, temperature=TEMPERATURE)
    (2 * expected).backward()
    found = run_ranks(2, on_two_ranks)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][0], expected.detach(), rtol=1e-14, atol=0)
    gradient = torch.cat([gradient for _, gradient, _ in found], dim=1)
    torch.testing.assert_close(gradient, 2 * predictions.grad, rtol=1e-12, atol=1e-15)
    for _, _, means in found:
        assert means["even"] == 2.0
        assert means["none"].isnan()


def test_means_of_what_counts() -> None:
    values = torch.tensor([1.0, -math.inf, 3.0])
    mask = torch.tensor([True, False, True])
    found = masked_means({"values": (values, mask), "true": (values > 2, mask), "none": (values, mask & False)})
    assert (found["values"], found["true"]) == (2.0, 0.5)
    assert found["none"].isnan()  # which the log leaves out


def test_images_of_several_classes_have_no_one_label() -> None:
    batch = ViewBatch(torch.zeros(2, 3, 3, 4, 4), torch.tensor([4, -1, 0]), torch.arange(3))
    assert class_labels(batch).tolist() == [4, -1, 0]
    batch.labels = torch.ones(3, 20)
    assert class_labels(batch).tolist() == [-1, -1, -1]
