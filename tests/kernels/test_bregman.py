"""The Bregman loss against the definition of its matrix in float64, on one process and on several."""

import importlib
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import bregman_tiled
from kernels.backends import triton_is_installed
from kernels.bregman import bregman_loss
from tests.distributed import run_ranks
from tests.kernels.comparison import TRITON_DEVICE, LargestTensor, error, needs_triton

TRITON = pytest.param("triton", marks=needs_triton)
TILED = ("tiled", "triton") if triton_is_installed() else ("tiled",)
TEMPERATURES = (0.01, 0.1, 0.5, 10.0)
CASES = [(1, 5), (2, 1), (5, 3), (37, 10), (18, 130)]  # N, K


def definition(
    scores1: Tensor,
    scores2: Tensor,
    weights1: Tensor | None = None,
    weights2: Tensor | None = None,
    *,
    temperature: float,
    sigma: float = 0.9,
) -> Tensor:
    """One anchor after the other; log(1 + Σ exp(negative - positive)) keeps its digits in a tiny loss."""
    scores = torch.cat([scores1, scores2])
    winners = [int(row.argmax()) for row in scores]
    losses = []
    for i, row in enumerate(scores):
        if weights1 is None or weights2 is None:
            of_winners = torch.stack([row[c] for c in winners])
        else:
            of_winners = torch.cat([weights1, weights2]) @ row
        divergence = row[winners[i]] - of_winners
        logits = torch.exp(-divergence / (2 * sigma**2)) / temperature
        p = (i + len(scores1)) % len(scores)
        is_negative = torch.ones(len(scores), dtype=scores.dtype)
        is_negative[[i, p]] = 0
        losses.append(torch.log1p(((logits - logits[p]).exp() * is_negative).sum()))
    return torch.stack(losses).mean()


def views(
    n: int, k: int, scale: float = 1, noise: float = 0.5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, difference = torch.randn(2, n, k, generator=generator, dtype=torch.float64) * scale
    return first.to(dtype), (first + noise * difference).to(dtype)


def soft_weights(n: int, k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    first, second = views(n, k, scale=2, seed=1)
    return first.softmax(1).to(dtype), second.softmax(1).to(dtype)


def loss_and_gradients(inputs: tuple[Tensor, ...], loss=bregman_loss, **options) -> tuple[Tensor, list[Tensor]]:
    """Loss and the gradients to scores and, if there are some, to weights."""
    device = TRITON_DEVICE if options.get("backend") == "triton" else inputs[0].device
    inputs = tuple(tensor.detach().to(device).requires_grad_() for tensor in inputs)
    if loss is bregman_loss and len(inputs) == 4:
        options["weights"] = inputs[2:]
        value = loss(*inputs[:2], **options)
    else:
        value = loss(*inputs, **options)
    gradients = torch.autograd.grad(value, inputs)
    return value.detach().cpu(), [torch.cat(gradients[at : at + 2]).cpu() for at in range(0, len(inputs), 2)]


def assert_close(found, expected, tolerance: float, what: object) -> None:
    assert error(found[0], expected[0]) < tolerance or expected[0].abs() < 1e-30, what
    for gradient, exact in zip(found[1], expected[1], strict=True):
        if exact.norm() > 1e-12:
            assert error(gradient, exact) < tolerance, what
        else:  # one subnetwork, or one pair: nothing to move
            assert gradient.norm() < tolerance, what


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(bregman_tiled, "TILE_ROWS", 7)
    monkeypatch.setattr(bregman_tiled, "TILE_COLUMNS", 12)
    monkeypatch.setattr(bregman_tiled, "TILE_ELEMENTS", 64)


@pytest.mark.parametrize(("n", "k"), CASES)
@pytest.mark.parametrize("scale", [0.1, 10])
@pytest.mark.parametrize("soft", [False, True])
def test_loss_and_gradients_are_those_of_the_definition(n, k, scale, soft):
    inputs32 = views(n, k, scale, dtype=torch.float32) + (soft_weights(n, k, torch.float32) if soft else ())
    inputs64 = tuple(tensor.double() for tensor in inputs32)
    for temperature in TEMPERATURES:
        exact = loss_and_gradients(inputs64, definition, temperature=temperature)
        for inputs, tolerance, backends in (
            (inputs32, 2e-5, TILED),
            (inputs64, 1e-11, ("tiled", "reference")),
        ):
            for backend in backends:
                found = loss_and_gradients(inputs, temperature=temperature, backend=backend)
                assert found[0].dtype == found[1][0].dtype == inputs[0].dtype
                assert_close(found, exact, tolerance, (inputs[0].dtype, temperature, backend))


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
def test_sigma_is_used(backend):
    inputs = views(37, 10, dtype=torch.float32) + soft_weights(37, 10, torch.float32)
    for some in (inputs[:2], inputs):
        exact = loss_and_gradients(tuple(x.double() for x in some), definition, temperature=0.2, sigma=0.4)
        found = loss_and_gradients(some, temperature=0.2, sigma=0.4, backend=backend)
        assert_close(found, exact, 1e-5, backend)


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradcheck(n, temperature):
    scores = [view.requires_grad_() for view in views(n, 4)]
    weights = [view.requires_grad_() for view in soft_weights(n, 4)]
    top = torch.cat(scores).topk(2).values
    assert (top[:, 0] - top[:, 1]).min() > 1e-3  # away from ties, where a winner changes
    assert torch.autograd.gradcheck(lambda a, b: bregman_loss(a, b, temperature=temperature), scores)
    assert torch.autograd.gradcheck(
        lambda a, b, v, w: bregman_loss(a, b, temperature=temperature, weights=(v, w)), [*scores, *weights]
    )


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
def test_of_equal_scores_the_first_wins(backend):
    scores1, scores2 = views(40, 9, dtype=torch.float32)
    scores1, scores2 = scores1.round(), scores2.round()
    top = torch.cat([scores1, scores2]).topk(2).values
    assert (top[:, 0] == top[:, 1]).any()
    exact = loss_and_gradients((scores1.double(), scores2.double()), definition, temperature=0.1)
    found = loss_and_gradients((scores1, scores2), temperature=0.1, backend=backend)
    assert_close(found, exact, 1e-5, backend)
    winner, counts = bregman_tiled.winners(torch.zeros(6, 5))
    assert winner.tolist() == [0] * 6
    assert counts.tolist() == [6, 0, 0, 0, 0]


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_one_winner_for_all_is_a_dead_state_that_soft_winners_leave(backend):
    scores1, scores2 = views(20, 6, dtype=torch.float32)
    scores1[:, 2] += 7
    scores2[:, 2] += 7
    loss, (gradient,) = loss_and_gradients((scores1, scores2), temperature=0.1, backend=backend)
    assert math.isclose(loss.item(), math.log(39), rel_tol=1e-6)
    assert not gradient.any()
    soft = loss_and_gradients((scores1, scores2, *soft_weights(20, 6, torch.float32)), temperature=0.1, backend=backend)
    assert soft[1][0].norm() > 1e-3


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
def test_one_hot_weights_are_the_hard_winner(backend):
    scores = views(37, 10, dtype=torch.float32)
    one_hot = tuple(torch.nn.functional.one_hot(view.argmax(1), 10).float() for view in scores)
    hard = loss_and_gradients(scores, temperature=0.1, backend=backend)
    soft = loss_and_gradients(scores + one_hot, temperature=0.1, backend=backend)
    assert error(soft[0], hard[0]) < 1e-6
    assert error(soft[1][0], hard[1][0]) < 1e-5


def test_weights_of_both_views_in_one_tensor_and_annealed():
    scores1, scores2 = views(37, 10)
    hard = bregman_loss(scores1, scores2, temperature=0.1)
    differences = []
    for sharpness in (1, 10, 1000):
        weights = (torch.cat([scores1, scores2]) * sharpness).softmax(1)
        soft = bregman_loss(scores1, scores2, temperature=0.1, weights=weights)
        assert soft == bregman_loss(scores1, scores2, temperature=0.1, weights=(weights[:37], weights[37:]))
        differences.append((soft - hard).abs().item())
    assert differences[0] > differences[1] > differences[2]
    assert differences[2] < 1e-2


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_scores_that_are_large_and_close_keep_their_differences(backend):
    scores = tuple((view * 64).round() / 64 for view in views(20, 6, dtype=torch.float32))
    raised = tuple(view + torch.arange(20)[:, None] * 1024.0 for view in scores)  # exact in float32
    low = loss_and_gradients(scores, temperature=0.1, backend=backend)
    high = loss_and_gradients(raised, temperature=0.1, backend=backend)
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[1][0], high[1][0])


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
@pytest.mark.parametrize("value", [1e30, -1e30, 3e38, -math.inf])
def test_huge_scores_rows_of_zeros_and_identical_rows(backend, value):
    scores1, scores2 = views(20, 6, dtype=torch.float32)
    scores1[3], scores2[3], scores1[5, 2], scores2[7] = 0, 0, value, scores1[0]
    for temperature in (0.01, 1.0):
        exact = loss_and_gradients((scores1.double(), scores2.double()), definition, temperature=temperature)
        found = loss_and_gradients((scores1, scores2), temperature=temperature, backend=backend)
        assert_close(found, exact, 1e-5, backend)
        assert found[1][0].isfinite().all()


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
@pytest.mark.parametrize("n", [1, 20])
def test_nan_comes_out_as_nan(backend, n):
    # The reference's gradient stays away from scores that are no one's winner's.
    whole = Tensor.any if backend == "reference" else Tensor.all
    for k in (6, 16):  # with columns behind the last one, and without
        for view in (0, 1):
            for place in (slice(3, 4), slice(None)):
                scores = views(n, k, dtype=torch.float32)
                scores[view][n // 2, place] = math.nan
                for inputs in (scores, scores + soft_weights(n, k, torch.float32)):
                    loss, gradients = loss_and_gradients(inputs, temperature=0.1, backend=backend)
                    assert loss.isnan()
                    assert whole(gradients[0][n // 2 + view * n].isnan())
                weights = soft_weights(n, k, torch.float32)
                weights[view][n // 2, place] = math.nan
                inputs = views(n, k, dtype=torch.float32) + weights
                loss, gradients = loss_and_gradients(inputs, temperature=0.1, backend=backend)
                assert loss.isnan()
                assert gradients[0].isnan().all(1).any()


@pytest.mark.parametrize("backend", ["tiled", TRITON])
@pytest.mark.parametrize("soft", [False, True])
def test_small_divergences_keep_their_digits(backend, soft):
    # exp(-D / 2σ²) in float32 knows 1 - 1e-5 to two digits of the 1e-5, which a temperature as low makes the logits.
    inputs = views(37, 10, scale=1e-5, dtype=torch.float32) + (soft_weights(37, 10, torch.float32) if soft else ())
    exact = loss_and_gradients(tuple(tensor.double() for tensor in inputs), definition, temperature=1e-5)
    found = loss_and_gradients(inputs, temperature=1e-5, backend=backend)
    plain = loss_and_gradients(inputs, temperature=1e-5, backend="reference")
    assert_close(found, exact, 2e-6, backend)
    assert error(plain[1][0], exact[1][0]) > 1e-4


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_a_tiny_loss_keeps_its_digits(backend):
    # Every image has a winner of its own, which both views agree on and no other image likes.
    scores1 = 8 * torch.eye(16) + 0.1 * views(16, 16)[0].float()
    scores2 = scores1 + 0.1 * views(16, 16, seed=1)[0].float()
    exact = loss_and_gradients((scores1.double(), scores2.double()), definition, temperature=0.05)
    found = loss_and_gradients((scores1, scores2), temperature=0.05, backend=backend)
    plain = loss_and_gradients((scores1, scores2), temperature=0.05, backend="reference")
    assert exact[0] < 1e-6
    assert_close(found, exact, 1e-5, backend)
    assert error(plain[0], exact[0]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
def test_half_precision_is_computed_in_float32(dtype, backend):
    inputs = views(37, 10, dtype=dtype) + soft_weights(37, 10, dtype)
    for some in (inputs[:2], inputs):
        exact = loss_and_gradients(tuple(x.double() for x in some), definition, temperature=0.1)
        loss, gradients = loss_and_gradients(some, temperature=0.1, backend=backend)
        assert loss.dtype == torch.float32
        assert error(loss, exact[0]) < 1e-5
        for gradient, expected in zip(gradients, exact[1], strict=True):
            assert gradient.dtype == dtype
            assert error(gradient, expected) < torch.finfo(dtype).eps


def test_autocast_changes_nothing():
    scores, weights = views(37, 10, dtype=torch.float32), soft_weights(37, 10, torch.float32)
    for some in (scores, scores + weights):
        expected = loss_and_gradients(some, temperature=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_and_gradients(some, temperature=0.1)
        assert torch.equal(found[0], expected[0])
        assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_strided_inputs_stay_as_they_are(backend):
    inputs = views(37, 10, dtype=torch.float32) + soft_weights(37, 10, torch.float32)
    expected = loss_and_gradients(inputs, temperature=0.1, backend=backend)
    strided = tuple(torch.stack([tensor, tensor], 2)[..., 0] for tensor in inputs)
    found = loss_and_gradients(strided, temperature=0.1, backend=backend)
    assert_close(found, expected, 1e-6, backend)
    assert all(map(torch.equal, strided, views(37, 10, dtype=torch.float32) + soft_weights(37, 10, torch.float32)))


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_upstream_gradient_and_inputs_without_one(backend):
    scores1, scores2 = (view.to(TRITON_DEVICE) for view in views(37, 10, dtype=torch.float32))
    weights = tuple(view.to(TRITON_DEVICE) for view in soft_weights(37, 10, torch.float32))
    for some in (None, weights):
        extra = () if some is None else some
        _, gradients = loss_and_gradients((scores1, scores2, *extra), temperature=0.1, backend=backend)
        leaf = scores1.clone().requires_grad_()
        (3 * bregman_loss(leaf, scores2, temperature=0.1, weights=some, backend=backend)).backward()
        assert error(leaf.grad.cpu(), 3 * gradients[0][:37]) < 1e-6
        assert not bregman_loss(scores1, scores2, temperature=0.1, weights=some, backend=backend).requires_grad
    leaf = weights[1].clone().requires_grad_()
    bregman_loss(scores1, scores2, temperature=0.1, weights=(weights[0], leaf), backend=backend).backward()
    assert error(leaf.grad.cpu(), gradients[1][37:]) < 1e-6


def test_never_holds_the_matrix(monkeypatch):
    monkeypatch.setattr(bregman_tiled, "TILE_ROWS", 128)
    monkeypatch.setattr(bregman_tiled, "TILE_COLUMNS", 128)
    monkeypatch.setattr(bregman_tiled, "TILE_ELEMENTS", 1 << 14)
    scores, weights = views(512, 20, dtype=torch.float32), soft_weights(512, 20, torch.float32)
    for some in (scores, scores + weights):
        with LargestTensor() as tiled:
            loss_and_gradients(some, temperature=0.1)
        assert tiled.elements <= 1024 * 21
    with LargestTensor() as reference:
        loss_and_gradients(scores, temperature=0.1, backend="reference")
    assert reference.elements >= 1024**2


ONES = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("scores1", "scores2", "options", "message"),
    [
        (ONES, torch.ones(5, 8), {}, r"shapes are torch.Size\(\[4, 8\]\) and torch.Size\(\[5, 8\]\)"),
        (torch.ones(4), torch.ones(4), {}, r"scores1 has shape \[4\], expected \[N, K\]"),
        (ONES, torch.ones(4, 0), {}, r"scores2 has shape \[4, 0\], expected \[N, K\] with N >= 1"),
        (ONES, ONES.double(), {}, "dtypes are torch.float32 and torch.float64"),
        (ONES.long(), ONES.long(), {}, "scores1 has dtype torch.int64, expected a floating"),
        (ONES, ONES, {"temperature": 0.0}, "temperature is 0.0, expected a finite"),
        (ONES, ONES, {"sigma": math.inf}, "sigma is inf"),
        (ONES, ONES, {"backend": "cuda"}, "'cuda', expected one of auto, triton"),
        (ONES, ONES, {"weights": (ONES, torch.ones(4, 7))}, r"shapes \[\[4, 8\], \[4, 7\]\], expected .* \[4, 8\]"),
        (ONES, ONES, {"weights": torch.ones(6, 8)}, r"shapes \[\[3, 8\], \[3, 8\]\], expected .* \[4, 8\]"),
        (ONES, ONES, {"weights": (ONES, ONES.long())}, "weights are torch.int64 on cpu"),
    ],
)
def test_wrong_inputs_are_named(scores1, scores2, options, message):
    with pytest.raises(ValueError, match=message):
        bregman_loss(scores1, scores2, **{"temperature": 0.1, **options})


# Several ranks. A rank takes seconds to start, so one start serves all combinations.

TRITON_ON_RANKS = triton_is_installed() and not torch.cuda.is_available()  # gloo and the interpreter: on the CPU
COMBINATIONS = [
    (dtype, backend, soft)
    for dtype in (torch.float32, torch.float64)
    for backend in ("tiled", "reference", "triton")
    for soft in (False, True)
    if (dtype, backend) != (torch.float64, "triton") and not (backend == "triton" and not TRITON_ON_RANKS)
]
PAIRS_A_RANK = 7


def encode(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The whole batch of both views, and subnetworks, linear ones, whose gradient the ranks average."""
    x1, x2 = views(n, 6, noise=1, dtype=dtype)
    subnetworks, _ = views(6, 5, dtype=dtype, seed=1)
    return x1, x2, subnetworks.requires_grad_()


def loss_of(scores1: Tensor, scores2: Tensor, soft: bool, **options) -> Tensor:
    weights = (scores1.softmax(1), scores2.softmax(1)) if soft else None
    return bregman_loss(scores1, scores2, temperature=0.1, weights=weights, **options)


def share_of_a_rank(group: dist.ProcessGroup) -> list[tuple[Tensor, Tensor, Tensor]]:
    bregman_tiled.TILE_ROWS, bregman_tiled.TILE_COLUMNS = 4, 3
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = slice(rank * PAIRS_A_RANK, (rank + 1) * PAIRS_A_RANK)
    shares = []
    for dtype, backend, soft in COMBINATIONS:
        x1, x2, subnetworks = encode(world * PAIRS_A_RANK, dtype)
        scores1, scores2 = x1[mine] @ subnetworks, x2[mine] @ subnetworks
        loss = loss_of(scores1, scores2, soft, group=group, backend=backend)
        *rows, gradient = torch.autograd.grad(loss, (scores1, scores2, subnetworks))
        dist.all_reduce(gradient, group=group)
        shares.append((loss.detach(), torch.stack(rows), gradient / world))
    # Weights that need no gradient: scores stay at home.
    scores1, scores2 = (view.requires_grad_() for view in views(3, 4, seed=rank))
    weights = soft_weights(3, 4)
    bregman_loss(scores1, scores2, temperature=0.1, weights=weights, group=group).backward()
    assert scores1.grad is not None
    return shares


def on_ranks(group: dist.ProcessGroup) -> tuple:
    importlib.import_module("tests.interpreter")  # pytest does it for its own process only
    pair = dist.new_group([1, 2])
    with pytest.raises(ValueError, match="different shape") as refusal:
        bregman_loss(*views(4 + dist.get_rank(group), 3), temperature=0.1, group=group)
    return share_of_a_rank(group), share_of_a_rank(pair) if dist.get_rank() > 0 else None, str(refusal.value)


def assert_shares_of_the_whole_batch(shares: list[list[tuple[Tensor, Tensor, Tensor]]]) -> None:
    world = len(shares)
    for case, (dtype, backend, soft) in enumerate(COMBINATIONS):
        x1, x2, subnetworks = encode(world * PAIRS_A_RANK, dtype)
        scores1, scores2 = x1 @ subnetworks, x2 @ subnetworks
        whole = loss_of(scores1, scores2, soft, backend="reference")
        *rows, gradient = torch.autograd.grad(whole, (scores1, scores2, subnetworks))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-9
        for rank, share in enumerate(shares):
            loss, rank_rows, rank_gradient = share[case]
            mine = slice(rank * PAIRS_A_RANK, (rank + 1) * PAIRS_A_RANK)
            what = (world, rank, dtype, backend, soft)
            assert error(loss, whole.detach()) < tolerance, what
            assert error(rank_rows / world, torch.stack(rows)[:, mine]) < tolerance, what
            assert error(rank_gradient, gradient) < tolerance, what


def test_two_or_three_ranks_are_one_process_and_refuse_unequal_batches():
    of_three, (_, *of_two), refusals = zip(*run_ranks(3, on_ranks), strict=True)
    assert_shares_of_the_whole_batch(of_three)
    assert_shares_of_the_whole_batch(of_two)
    for message in refusals:
        assert "[[4, 3, 8], [5, 3, 8], [6, 3, 8]]" in message
