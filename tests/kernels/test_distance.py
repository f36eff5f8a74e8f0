"""Distance correlation against the statistics of the papers in numpy, on one process and on several."""

import importlib
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.backends import triton_is_installed
from kernels.distance import distance_correlation
from tests.distributed import run_ranks
from tests.kernels.comparison import TRITON_DEVICE, LargestTensor, error, needs_triton

TRITON = pytest.param("triton", marks=needs_triton)
TILED = ("tiled", "triton") if triton_is_installed() else ("tiled",)
CASES = [(4, 3, 2), (5, 1, 700), (37, 20, 3), (67, 530, 7)]  # n, p, q


def bias_corrected(x: np.ndarray, y: np.ndarray) -> float:
    """R*² of Székely & Rizzo 2014: definition 2 (U-centring), equations 2.2 and 2.4."""
    n = len(x)

    def u_centred(rows: np.ndarray) -> np.ndarray:
        a = distances(rows)
        centred = np.empty((n, n))
        for i in range(n):
            for j in range(n):
                means = a[i].sum() / (n - 2) + a[:, j].sum() / (n - 2) - a.sum() / ((n - 1) * (n - 2))
                centred[i, j] = 0 if i == j else a[i, j] - means
        return centred

    a, b = u_centred(x), u_centred(y)
    inner = [(first * second).sum() / (n * (n - 3)) for first, second in ((a, b), (a, a), (b, b))]
    return inner[0] / np.sqrt(inner[1] * inner[2])


def of_v_statistics(x: np.ndarray, y: np.ndarray) -> float:
    """R of Székely, Rizzo & Bakirov 2007: definitions 4 and 5, equations 2.8 to 2.10."""

    def covariance(first: np.ndarray, second: np.ndarray) -> float:
        centred = []
        for a in (first, second):
            centred.append(a - a.mean(1, keepdims=True) - a.mean(0, keepdims=True) + a.mean())
        return (centred[0] * centred[1]).mean()

    a, b = distances(x), distances(y)
    return np.sqrt(covariance(a, b) / np.sqrt(covariance(a, a) * covariance(b, b)))


def distances(rows: np.ndarray) -> np.ndarray:
    return np.array([[np.sqrt(((one - two) ** 2).sum()) for two in rows] for one in rows])


def features(
    n: int, p: int, q: int, dependence: float = 0.5, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=generator, dtype=torch.float64)
    y = torch.randn(n, q, generator=generator, dtype=torch.float64) + dependence * x[:, :1].square()
    return x.to(dtype), y.to(dtype)


def value_and_gradients(x: Tensor, y: Tensor, **options) -> tuple[Tensor, Tensor, Tensor]:
    device = TRITON_DEVICE if options.get("backend") == "triton" else x.device
    x, y = x.detach().to(device).requires_grad_(), y.detach().to(device).requires_grad_()
    value = distance_correlation(x, y, **options)
    of_x, of_y = torch.autograd.grad(value, (x, y))
    return value.detach().cpu(), of_x.cpu(), of_y.cpu()


@pytest.mark.parametrize(("n", "p", "q"), CASES)
@pytest.mark.parametrize("unbiased", [True, False])
def test_value_and_gradients_are_those_of_the_papers(n, p, q, unbiased):
    x, y = features(n, p, q, dtype=torch.float32)
    x = x + 1000  # centring is the implementation's business
    statistic = bias_corrected if unbiased else of_v_statistics
    expected = statistic(x.double().numpy(), y.double().numpy())
    # The gradient of the same formula, by autograd over differences of float64 rows.
    exact = value_and_gradients(x.double(), y.double(), unbiased=unbiased, backend="reference")
    assert abs(exact[0] - expected) < 1e-13
    found64 = value_and_gradients(x.double(), y.double(), unbiased=unbiased)
    assert abs(found64[0] - expected) < 1e-12
    for backend in TILED:
        found = value_and_gradients(x, y, unbiased=unbiased, backend=backend)
        assert abs(found[0].item() - expected) < 1e-6, backend
        for gradient, gradient64, right in zip(found[1:], found64[1:], exact[1:], strict=True):
            assert gradient.dtype == torch.float32
            assert error(gradient64, right) < 1e-9
            assert error(gradient, right) < 1e-5, backend


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("n", [4, 7])
def test_gradcheck(n, unbiased):
    inputs = [rows.requires_grad_() for rows in features(n, 3, 2)]
    assert torch.autograd.gradcheck(lambda x, y: distance_correlation(x, y, unbiased=unbiased), inputs)


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
def test_motions_and_scales_change_nothing_and_make_it_one(backend):
    x, y = features(14, 12, 5, dtype=torch.float32)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))
    for unbiased in (True, False):
        value, of_x, of_y = value_and_gradients(x, y, unbiased=unbiased, backend=backend)
        moved, of_moved, of_y_again = value_and_gradients(8 * x @ turn + 3, y, unbiased=unbiased, backend=backend)
        assert abs(value - moved) < 1e-5
        assert error(of_moved @ turn.T * 8, of_x) < 1e-4
        assert error(of_y_again, of_y) < 1e-4
        same, *_ = value_and_gradients(x, 0.01 * x @ turn - 7, unbiased=unbiased, backend=backend)
        assert abs(same - 1) < 1e-6


def test_independent_features_of_high_dimension():
    generator = torch.Generator(TRITON_DEVICE).manual_seed(0)
    corrected, biased = [], []
    for _ in range(8):
        x, y = torch.randn(2, 40, 900, generator=generator, device=TRITON_DEVICE)
        corrected.append(distance_correlation(x, y).item())
        biased.append(distance_correlation(x, y, unbiased=False).item())
    assert abs(np.mean(corrected)) < 0.03
    assert min(corrected) < 0 < max(corrected)
    assert min(biased) > 0.9  # what the correction is for


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_equal_rows_and_rows_that_are_nearly_equal(backend, unbiased):
    x, y = features(20, 30, 4, dtype=torch.float32)
    x, y = x + 10, y.clone()
    x[3], y[3], y[9], x[5] = x[2], y[2], y[8], x[2] + 1e-3 * x[7]
    x[12] = x[11] + 1e-5
    exact = value_and_gradients(x.double(), y.double(), unbiased=unbiased, backend="reference")
    found = value_and_gradients(x, y, unbiased=unbiased, backend=backend)
    assert abs(found[0] - exact[0]) < 1e-6
    assert found[1].isfinite().all()
    assert error(found[2], exact[2]) < 1e-5
    for place, (row, right) in enumerate(zip(found[1], exact[1], strict=True)):
        # Triton makes the gradient of two rows from float32 products that are larger than it as the rows are close:
        # rows 2 and 5 are 1e-3 apart, 11 and 12 only 1e-5.
        allowed = {2: 2e-5, 3: 2e-5, 5: 2e-5, 11: 2e-2, 12: 2e-2}.get(place, 2e-6) if backend == "triton" else 2e-6
        assert error(row, right) < allowed, place


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_features_without_variation_say_nothing(backend, unbiased):
    x, y = features(4, 30, 4, dtype=torch.float32)
    for constant in (torch.full((4, 30), 1234.567), x[:1].expand(4, 30)):
        for first, second in ((constant, y), (y, constant), (constant, constant)):
            value, *gradients = value_and_gradients(first, second, unbiased=unbiased, backend=backend)
            assert value == 0
            assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_nan_is_neither_constant_nor_independent(backend, unbiased):
    x, y = features(5, 9, 4, dtype=torch.float32)
    one_number, one_row = x.clone(), x.clone()
    one_number[3, 7], one_row[3] = math.nan, math.nan
    for broken in (one_number, one_row):
        for other in (y, torch.ones(5, 4)):  # nothing can be told about a constant, of numbers
            for inputs in ((broken, other), (other, broken)):
                value, *gradients = value_and_gradients(*inputs, unbiased=unbiased, backend=backend)
                assert value.isnan()
                if other is y:
                    assert gradients[0][3].isnan().all()
                    assert gradients[1][3].isnan().all()


@pytest.mark.parametrize("backend", ["tiled", TRITON])
@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15, 1e30])
def test_values_whose_squares_leave_float32(backend, scale):
    x, y = features(9, 30, 4, dtype=torch.float32)
    value, of_x, of_y = value_and_gradients(x, y, backend="tiled")
    scaled, of_scaled, of_same = value_and_gradients(scale * x, y, backend=backend)
    assert abs(value - scaled) < 1e-6
    assert error(of_scaled.double() * scale, of_x) < 1e-5
    assert error(of_same, of_y) < 1e-5


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(backend, dtype):
    x, y = features(12, 20, 3, dtype=dtype)
    for second in (y, y.float()):
        exact = value_and_gradients(x.double(), second.double(), backend="reference")
        found = value_and_gradients(x, second, backend=backend)
        assert found[0].dtype == torch.float32
        assert abs(found[0] - exact[0]) < 1e-6
        for gradient, right, rows in zip(found[1:], exact[1:], (x, second), strict=True):
            assert gradient.dtype == rows.dtype
            assert error(gradient, right) < max(1e-5, torch.finfo(rows.dtype).eps)


def test_autocast_changes_nothing():
    x, y = features(37, 20, 3, dtype=torch.float32)
    expected = value_and_gradients(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(x, y)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strided_inputs_stay_as_they_are(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="no float64 inputs"):
            distance_correlation(*features(9, 3, 4), backend=backend)
        return
    x, y = features(12, 20, 3, dtype=dtype)
    expected = value_and_gradients(x, y, backend=backend)
    strided, transposed = torch.stack([x, x], 2)[..., 0], y.T.contiguous().T
    found = value_and_gradients(strided, transposed, backend=backend)
    for one, other in zip(found, expected, strict=True):
        assert error(one, other) < 1e-6
    for copy, original in zip((strided, transposed), features(12, 20, 3, dtype=dtype), strict=True):
        assert torch.equal(copy, original)


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_upstream_gradient_and_inputs_without_one(backend):
    x, y = (rows.to(TRITON_DEVICE) for rows in features(9, 30, 4, dtype=torch.float32))
    _, of_x, of_y = value_and_gradients(x, y, backend=backend)
    for place, expected in ((0, of_x), (1, of_y)):
        inputs = [x, y]
        inputs[place] = inputs[place].clone().requires_grad_()
        (3 * distance_correlation(*inputs, backend=backend)).backward()
        assert error(inputs[place].grad.cpu(), 3 * expected) < 1e-6
    assert not distance_correlation(x, y, backend=backend).requires_grad
    x.requires_grad_()
    distance_correlation(x, x, backend=backend).backward()
    assert x.grad.abs().max() < 1e-6  # it is 1 whatever x is


def test_wide_features_are_visited_in_parts(monkeypatch):
    from kernels import distance_tiled

    x, y = features(30, 5000, 3, dtype=torch.float32)
    expected = value_and_gradients(x, y)
    monkeypatch.setattr(distance_tiled, "_BLOCK_ELEMENTS", 30 * 64)
    found = value_and_gradients(x, y)
    assert all(error(one, other) < 1e-6 for one, other in zip(found, expected, strict=True))
    with LargestTensor() as of_whole, torch.no_grad():
        distance_correlation(x, y)
    assert of_whole.elements <= 30 * 5000  # a view of x itself at most: no copy of it in float64, no [n, n, p]


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.ones(4, 8), torch.ones(5, 8), {}, "4 rows on cpu and 5 rows on cpu"),
        (torch.ones(4), torch.ones(4), {}, r"x has shape \[4\], expected \[n, features\]"),
        (torch.ones(4, 8), torch.ones(4, 0), {}, r"y has shape \[4, 0\]"),
        (torch.ones(4, 8), torch.ones(4, 8).long(), {}, "y has dtype torch.int64, expected a floating"),
        (torch.ones(3, 8), torch.ones(3, 8), {}, "3 rows over all ranks, expected at least 4"),
        (torch.ones(1, 8), torch.ones(1, 8), {"unbiased": False}, "1 rows over all ranks, expected at least 2"),
        (torch.ones(4, 8), torch.ones(4, 8), {"backend": "cuda"}, "'cuda', expected one of auto, triton"),
    ],
)
def test_wrong_inputs_are_named(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        distance_correlation(x, y, **options)


# Several ranks. A rank takes seconds to start, so one start serves all combinations.

TRITON_ON_RANKS = triton_is_installed() and not torch.cuda.is_available()  # gloo and the interpreter: on the CPU
COMBINATIONS = [
    (dtype, backend, unbiased)
    for dtype in (torch.float32, torch.float64)
    for backend in ("tiled", "reference", "triton")
    for unbiased in (True, False)
    if backend != "triton" or (TRITON_ON_RANKS and unbiased and dtype == torch.float32)
]
ROWS_A_RANK = 4


def encode(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Images' features, and those that a linear encoder makes, whose gradient the ranks average."""
    x, y = features(n, 7, 3, dtype=dtype)
    x[1] = x[0] + 1e-3 * x[2]  # on one rank, and close
    x[n - 1] = x[0]  # on different ranks, and equal
    encoder, _ = features(3, 4, 1, dtype=dtype, seed=1)
    return x, y, encoder.requires_grad_()


def share_of_a_rank(group: dist.ProcessGroup) -> list[tuple[Tensor, Tensor, Tensor]]:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = slice(rank * ROWS_A_RANK, (rank + 1) * ROWS_A_RANK)
    shares = []
    for dtype, backend, unbiased in COMBINATIONS:
        x, y, encoder = encode(world * ROWS_A_RANK, dtype)
        z = y[mine] @ encoder
        value = distance_correlation(x[mine], z, unbiased=unbiased, group=group, backend=backend)
        rows, gradient = torch.autograd.grad(value, (z, encoder))
        dist.all_reduce(gradient, group=group)
        shares.append((value.detach(), rows, gradient / world))
    return shares


def on_ranks(group: dist.ProcessGroup) -> tuple:
    importlib.import_module("tests.interpreter")  # pytest does it for its own process only
    pair = dist.new_group([1, 2])
    with pytest.raises(ValueError, match="different shape") as refusal:
        distance_correlation(*features(4 + dist.get_rank(group), 3, 2), group=group)
    with pytest.raises(ValueError, match="3 rows over all ranks"):
        distance_correlation(*features(1, 3, 2), group=group)
    return share_of_a_rank(group), share_of_a_rank(pair) if dist.get_rank() > 0 else None, str(refusal.value)


def assert_shares_of_the_whole_batch(shares: list[list[tuple[Tensor, Tensor, Tensor]]]) -> None:
    world = len(shares)
    for case, (dtype, backend, unbiased) in enumerate(COMBINATIONS):
        x, y, encoder = encode(world * ROWS_A_RANK, dtype)
        z = y @ encoder
        whole = distance_correlation(x, z, unbiased=unbiased, backend="reference")
        rows, gradient = torch.autograd.grad(whole, (z, encoder))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-9
        for rank, share in enumerate(shares):
            value, rank_rows, rank_gradient = share[case]
            mine = slice(rank * ROWS_A_RANK, (rank + 1) * ROWS_A_RANK)
            what = (world, rank, dtype, backend, unbiased)
            assert abs(value - whole) < tolerance, what
            assert error(rank_rows / world, rows[mine]) < tolerance, what
            assert error(rank_gradient, gradient) < tolerance, what


def test_two_or_three_ranks_are_one_process_and_refuse_unequal_batches():
    of_three, (_, *of_two), refusals = zip(*run_ranks(3, on_ranks), strict=True)
    assert_shares_of_the_whole_batch(of_three)
    assert_shares_of_the_whole_batch(of_two)
    for message in refusals:
        assert "[[4, 3, 8], [5, 3, 8], [6, 3, 8]]" in message


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_of_many_rows_no_matrix_is_kept(monkeypatch, unbiased, dtype):
    """Tiles that do not fit evenly, columns in parts, against the statistics of the papers and the stored distances."""
    from kernels import distance, distance_streamed

    x, y = features(67, 30, 7, dtype=dtype)
    x = x + 100
    x[12], y[40] = x[50], y[3]  # equal rows in different tiles
    y[5] = y[4]
    exact = value_and_gradients(x.double(), y.double(), unbiased=unbiased, backend="reference")
    monkeypatch.setattr(distance, "MOST_STORED", 0)
    monkeypatch.setattr(distance_streamed, "TILE", 16)
    monkeypatch.setattr(distance_streamed, "_BLOCK_ELEMENTS", 16 * 13)
    found = value_and_gradients(x, y, unbiased=unbiased, backend="tiled")
    statistic = bias_corrected if unbiased else of_v_statistics
    assert abs(found[0].item() - statistic(x.double().numpy(), y.double().numpy())) < (
        1e-12 if dtype == torch.float64 else 1e-6
    )
    for gradient, right in zip(found[1:], exact[1:], strict=True):
        assert gradient.dtype == dtype
        assert error(gradient, right) < (1e-9 if dtype == torch.float64 else 1e-5)


def test_streamed_and_stored_agree_on_what_is_odd(monkeypatch):
    """Upstream gradients, inputs without one, features that are all the same, and NaN."""
    from kernels import distance

    x, y = features(20, 3, 2)

    def found(x: Tensor, y: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        value = distance_correlation(x, y, backend="tiled")
        return [value.detach(), *torch.autograd.grad(-3 * value, x)]

    cases = [(x, y), (torch.ones_like(x), y), (x, torch.full_like(y, 0.1)), (x.clone().fill_diagonal_(math.nan), y)]
    stored = [found(*case) for case in cases]
    monkeypatch.setattr(distance, "MOST_STORED", 0)
    for case, expected in zip(cases, stored, strict=True):
        torch.testing.assert_close(found(*case), expected, equal_nan=True)


def test_memory_is_that_of_rows_not_of_pairs():
    """1,200 rows: a matrix of float64 has 1.44 million elements, a tile 65,536, the rows 9,600."""
    x, y = features(1200, 8, 5, dtype=torch.float32)
    with LargestTensor() as largest:
        value_and_gradients(x, y, backend="tiled")
    assert largest.elements <= 1 << 16
