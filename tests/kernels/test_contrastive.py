"""The row-against-column loss against its definition in float64, tiled and in Triton."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import contrastive, contrastive_loss
from tests.kernels.comparison import TRITON_DEVICE, LargestTensor, error, needs_triton

CASES = [  # M, L, D, rows and columns of a tile
    (1, 1, 4, 256, 256),
    (1, 2, 4, 256, 256),
    (5, 3, 1, 2, 2),
    (37, 53, 130, 5, 33),
    (64, 64, 16, 64, 64),
    (300, 20, 8, 64, 7),
]


def definition(anchors: Tensor, candidates: Tensor, positive: Tensor, exclude: Tensor | None, temperature: float):
    """One row after the other; log(1 + Σ exp(negative - positive)) keeps its digits in a tiny loss."""
    losses = []
    for i, anchor in enumerate(anchors):
        logits = candidates @ anchor / temperature
        negative = torch.ones(len(candidates), dtype=torch.bool)
        negative[positive[i]] = False
        if exclude is not None and exclude[i] >= 0:
            negative[exclude[i]] = False
        losses.append(torch.log1p((logits[negative] - logits[positive[i]]).exp().sum()))
    return torch.stack(losses)


def rows(m: int, count: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.randn(m, d, generator=generator, dtype=torch.float64)
    candidates = torch.randn(count, d, generator=generator, dtype=torch.float64)
    positive = torch.randint(count, (m,), generator=generator)
    candidates[positive] += anchors  # of rows that share a positive, one gets it
    return F.normalize(anchors).to(dtype), F.normalize(candidates).to(dtype), positive


def others(positive: Tensor, count: int) -> Tensor | None:
    """A column to leave out for each row, none for some."""
    if count == 1:
        return None
    exclude = (positive + 1 + torch.arange(len(positive)) % (count - 1)) % count
    exclude[::3] = -1
    return exclude


def evaluate(function, anchors: Tensor, candidates: Tensor, *arguments, **options) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and both gradients of their sum weighted by 1, 2, 3 …"""
    anchors, candidates = anchors.detach().requires_grad_(), candidates.detach().requires_grad_()
    losses = function(anchors, candidates, *arguments, **options)
    weights = torch.arange(1, len(losses) + 1, dtype=losses.dtype, device=losses.device)
    return losses.detach(), *torch.autograd.grad(losses, (anchors, candidates), weights)


def exact(anchors: Tensor, candidates: Tensor, positive: Tensor, exclude: Tensor | None, temperature: float):
    return evaluate(definition, anchors.double(), candidates.double(), positive, exclude, temperature)


@pytest.mark.parametrize(("m", "count", "d", "tile_rows", "tile_columns"), CASES)
@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
def test_loss_and_gradients_are_those_of_the_definition(m, count, d, tile_rows, tile_columns, temperature, monkeypatch):
    monkeypatch.setattr(contrastive, "TILE_ROWS", tile_rows)
    monkeypatch.setattr(contrastive, "TILE_COLUMNS", tile_columns)
    anchors, candidates, positive = rows(m, count, d)
    for exclude in (None, others(positive, count)):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            inputs = anchors.to(dtype), candidates.to(dtype)
            expected = exact(*inputs, positive, exclude, temperature)
            for backend in ("tiled", "reference"):
                found = evaluate(
                    contrastive_loss, *inputs, positive, exclude=exclude, temperature=temperature, backend=backend
                )
                for value, target in zip(found, expected, strict=True):
                    assert value.dtype == dtype
                    allowed = tolerance * max(1, 0.03 / temperature) * max(1.0, target.norm().item())
                    assert (value - target).norm() <= allowed, backend


def test_a_small_loss_keeps_its_digits():
    anchors, candidates, positive = torch.eye(3), torch.eye(3), torch.arange(3)
    expected = exact(anchors, candidates, positive, None, 0.05)
    found = evaluate(contrastive_loss, anchors, candidates, positive, temperature=0.05, backend="tiled")
    assert expected[0].max() < 1e-8
    for value, target in zip(found, expected, strict=True):
        assert error(value, target) < 1e-6


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(contrastive, "TILE_ROWS", 3)
    monkeypatch.setattr(contrastive, "TILE_COLUMNS", 2)
    anchors, candidates, positive = rows(5, 4, 3)
    anchors.requires_grad_()
    candidates.requires_grad_()
    for exclude in (None, others(positive, 4)):
        assert torch.autograd.gradcheck(
            lambda a, c, exclude=exclude: contrastive_loss(a, c, positive, temperature=0.4, exclude=exclude),
            (anchors, candidates),
        )


def test_hits_are_rows_whose_positive_is_the_arg_max():
    anchors, candidates, positive = rows(50, 40, 4)
    exclude = others(positive, 40)
    logits = anchors @ candidates.T
    for left_out in (None, exclude):
        masked = logits.clone()
        if left_out is not None:
            kept = left_out >= 0
            masked[kept.nonzero()[:, 0], left_out[kept]] = -math.inf
        expected = masked.argmax(1) == positive
        assert 0 < expected.sum() < 50
        for backend in ("tiled", "reference"):
            _, hits = contrastive_loss(
                anchors, candidates, positive, temperature=0.1, exclude=left_out, return_hits=True, backend=backend
            )
            assert torch.equal(hits, expected), backend


def test_a_tie_is_no_hit():
    same = torch.ones(4, 8)
    for backend in ("tiled", "reference"):
        losses, hits = contrastive_loss(same, same, torch.arange(4), temperature=0.1, return_hits=True, backend=backend)
        assert not hits.any()
        torch.testing.assert_close(losses, torch.full((4,), math.log(4.0)))


BACKENDS = ["tiled", "reference", pytest.param("triton", marks=needs_triton)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_collapsed_encoder_has_no_hits(backend, dtype):
    for seed in range(6):  # the two sides of a tie are rounded apart for some
        same = torch.randn(1, 40, generator=torch.Generator().manual_seed(seed)).expand(30, 40)
        same = F.normalize(same).to(dtype).to(TRITON_DEVICE if backend == "triton" else "cpu")
        positive = torch.arange(30, device=same.device)
        _, hits = contrastive_loss(same, same, positive, temperature=0.1, return_hits=True, backend=backend)
        assert not hits.any(), seed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_not_made_one(backend, value):
    anchors, candidates, _ = rows(5, 6, 8, torch.float32)
    positive = torch.tensor([0, 1, 2, 3, 0])
    candidates[4, 3] = value  # nobody's positive; with inf, a logit of inf or -inf
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    losses = contrastive_loss(
        anchors.to(device), candidates.to(device), positive.to(device), temperature=0.1, backend=backend
    ).cpu()
    if math.isnan(value):
        assert losses.isnan().all()
    else:
        certain = anchors[:, 3] < 0  # the negative's weight is exp(-inf)
        assert not losses[~certain].isfinite().any()
        kept = torch.tensor([0, 1, 2, 3, 5])
        expected = definition(anchors.double(), candidates[kept].double(), positive, None, 0.1)
        unsaid = losses.isnan() & (backend == "triton")  # there infinity has no low half, so that it spoils the row
        assert ((losses - expected).abs() < 1e-4)[certain & ~unsaid].all()
        assert 0 < certain.sum() < 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_indices_of_32_bits(backend):
    anchors, candidates, positive = rows(20, 30, 8, torch.float32)
    device = TRITON_DEVICE if backend == "triton" else "cpu"
    inputs = anchors.to(device), candidates.to(device)
    found = contrastive_loss(
        *inputs, positive.int().to(device), exclude=others(positive, 30).int().to(device), temperature=0.1,
        backend=backend,
    )  # fmt: skip
    expected = exact(anchors, candidates, positive, others(positive, 30), 0.1)[0]
    assert error(found.cpu(), expected) < 1e-5


def test_gradients_of_shared_positives_are_the_same_in_every_run():
    anchors, candidates, _ = rows(4096, 64, 32, torch.float32)
    positive = torch.arange(4096) % 3
    candidates.requires_grad_()
    torch.set_num_threads(2)
    try:
        gradients = []
        for _ in range(4):
            loss = contrastive_loss(anchors, candidates, positive, temperature=0.1).sum()
            gradients.append(torch.autograd.grad(loss, candidates)[0])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_a_tensor_is_no_temperature():
    with pytest.raises(TypeError, match="expected a number; to learn it"):
        contrastive_loss(*rows(3, 3, 4), temperature=torch.tensor(0.1, requires_grad=True))


def test_candidates_without_gradient_and_never_the_matrix():
    anchors, candidates, positive = rows(2048, 4096, 16, torch.float32)
    anchors.requires_grad_()
    with LargestTensor() as tiled:
        contrastive_loss(anchors, candidates, positive, temperature=0.1).sum().backward()
    assert candidates.grad is None
    assert tiled.elements <= 2048 * 4096 // 64


@needs_triton
@pytest.mark.parametrize(
    ("m", "count", "d", "temperature", "dtype", "tolerance"),
    [
        (1, 1, 4, 0.1, torch.float32, 2e-6),
        (37, 53, 8, 0.1, torch.float32, 3e-6),
        (70, 130, 20, 0.01, torch.float32, 2e-5),
        (130, 70, 16, 10.0, torch.float32, 3e-6),
        (9, 20, 150, 0.5, torch.float32, 3e-6),
        (37, 53, 8, 0.1, torch.float16, 1e-3),
        (20, 70, 300, 0.1, torch.bfloat16, 1e-2),
    ],
)
def test_triton_is_the_definition(m, count, d, temperature, dtype, tolerance):
    anchors, candidates, positive = rows(m, count, d, dtype)
    for exclude in (None, others(positive, count)):
        expected = exact(anchors, candidates, positive, exclude, temperature)
        found = evaluate(
            contrastive_loss,
            anchors.to(TRITON_DEVICE),
            candidates.to(TRITON_DEVICE),
            positive.to(TRITON_DEVICE),
            exclude=None if exclude is None else exclude.to(TRITON_DEVICE),
            temperature=temperature,
            backend="triton",
        )
        assert found[0].dtype == torch.float32
        for value, target in zip(found, expected, strict=True):
            assert (value.cpu() - target).norm() <= tolerance * max(1.0, target.norm().item())


@needs_triton
@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
def test_triton_takes_any_scale_of_float32(scale):
    anchors, candidates, positive = rows(20, 30, 16, torch.float32)
    expected = exact(anchors, candidates, positive, None, 0.1)
    found = evaluate(
        contrastive_loss,
        (anchors * scale).to(TRITON_DEVICE),
        (candidates / scale).to(TRITON_DEVICE),
        positive.to(TRITON_DEVICE),
        temperature=0.1,
        backend="triton",
    )
    assert error(found[0].cpu(), expected[0]) < 1e-5
    assert error(found[1].cpu().double() * scale, expected[1]) < 1e-5
    assert error(found[2].cpu().double() / scale, expected[2]) < 1e-5


@needs_triton
def test_triton_hits():
    anchors, candidates, positive = rows(50, 40, 4, torch.float32)
    for exclude in (None, others(positive, 40)):
        logits = anchors.double() @ candidates.double().T
        if exclude is not None:
            kept = exclude >= 0
            logits[kept.nonzero()[:, 0], exclude[kept]] = -math.inf
        _, hits = contrastive_loss(
            *(tensor.to(TRITON_DEVICE) for tensor in (anchors, candidates, positive)), temperature=0.1,
            exclude=None if exclude is None else exclude.to(TRITON_DEVICE), return_hits=True, backend="triton",
        )  # fmt: skip
        assert torch.equal(hits.cpu(), logits.argmax(1) == positive)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"anchors": torch.ones(4)}, r"anchors has shape \[4\]"),
        ({"candidates": torch.ones(0, 8)}, r"candidates has shape \[0, 8\]"),
        ({"candidates": torch.ones(6, 9)}, r"must share D, got \[4, 8\] and \[6, 9\]"),
        ({"candidates": torch.ones(6, 8).double()}, "differ in dtype: torch.float32 and torch.float64"),
        ({"candidates": torch.ones(6, 8, device="meta")}, "differ in device: cpu and meta"),
        ({"anchors": torch.ones(4, 8).long()}, "anchors has dtype torch.int64"),
        ({"positive": torch.zeros(3).long()}, r"positive is \[3\] torch.int64, expected \[4\] int64 or int32"),
        ({"positive": torch.zeros(4)}, r"positive is \[4\] torch.float32"),
        ({"positive": torch.zeros(4, dtype=torch.uint8)}, r"positive is \[4\] torch.uint8"),
        ({"positive": torch.tensor([0, 1, 2, 6])}, "positive names columns 0 to 6, expected 0 to 5"),
        ({"positive": torch.tensor([0, 1, 2, -1])}, "positive names columns -1 to 2"),
        ({"exclude": torch.tensor([0, 1, 2, -2])}, "exclude names columns -2 to 2, expected -1 to 5"),
        ({"exclude": torch.tensor([-1, -1, 2, 0])}, "exclude leaves out the positive of row 2"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"backend": "fast"}, "backend is 'fast', expected one of auto, triton, tiled, reference"),
    ],
)
def test_wrong_inputs_are_named(changes, message):
    arguments = {"anchors": torch.ones(4, 8), "candidates": torch.ones(6, 8), "positive": torch.arange(4)}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**{"temperature": 0.1, **arguments, **changes})
