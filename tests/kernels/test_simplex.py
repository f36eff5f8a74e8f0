"""The simplex loss against its definition in float64, on one process and on several."""

import importlib
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import simplex_tiled
from kernels.backends import triton_is_installed
from kernels.simplex import simplex_loss
from tests.distributed import run_ranks
from tests.kernels.comparison import TRITON_DEVICE, LargestTensor, error, needs_triton

TRITON = pytest.param("triton", marks=needs_triton)
TEMPERATURES = (0.01, 0.05, 0.5, 0.7, 1.0, 10.0)
CASES = [  # N, C, rows and columns of a tile
    (2, 3, 256, 256),
    (3, 130, 2, 2),
    (37, 8, 7, 5),
    (37, 21, 5, 33),
    (150, 130, 64, 96),
]


def definition(z1: Tensor, z2: Tensor, temperature: float, beta: float = 0.8, floor: float = 1e-4) -> Tensor:
    """One anchor after the other; log(1 + Σ exp(negative - positive)) keeps its digits in a tiny loss."""

    def posterior(z: Tensor) -> Tensor:
        u = torch.log1p((-(beta * z).abs()).exp()) / beta + z.clamp_min(0)
        return u / u.sum(1, keepdim=True)

    first, second = posterior(z1), posterior(z2)
    n = len(first)
    losses = []
    for i in range(n):
        for r in (n * second @ first[i], n * first @ second[i]):
            logits = torch.where(r > floor, r, floor).log() / temperature
            is_negative = (torch.arange(n) != i).to(z1)
            losses.append(torch.log1p(((logits - logits[i]).exp() * is_negative).sum()))
    return torch.stack(losses).mean()


def views(
    n: int, c: int, scale: float = 1, noise: float = 0.3, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z1, difference = torch.randn(2, n, c, generator=generator, dtype=torch.float64) * scale
    return z1.to(dtype), (z1 + noise * difference).to(dtype)


def loss_and_gradient(z1: Tensor, z2: Tensor, loss=simplex_loss, **options) -> tuple[Tensor, Tensor]:
    on_gpu = options.get("backend") == "triton"
    z1, z2 = (z.detach().to(TRITON_DEVICE if on_gpu else z.device).requires_grad_() for z in (z1, z2))
    value = loss(z1, z2, **options)
    return value.detach().cpu(), torch.cat(torch.autograd.grad(value, (z1, z2))).cpu()


@pytest.fixture
def tile(monkeypatch):
    def set_tile(rows: int, columns: int) -> None:
        monkeypatch.setattr(simplex_tiled, "TILE_ROWS", rows)
        monkeypatch.setattr(simplex_tiled, "TILE_COLUMNS", columns)

    return set_tile


@pytest.mark.parametrize(("n", "c", "rows", "columns"), CASES)
@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_loss_and_gradient_are_those_of_the_definition(n, c, rows, columns, scale, tile):
    tile(rows, columns)
    views32 = views(n, c, scale, dtype=torch.float32)
    views64 = [z.double() for z in views32]
    for temperature in TEMPERATURES:
        exact, exact_gradient = loss_and_gradient(*views64, definition, temperature=temperature)
        for inputs, tolerance in ((views32, 1e-5), (views64, 5e-12)):
            loss, gradient = loss_and_gradient(*inputs, temperature=temperature)
            assert loss.dtype == gradient.dtype == inputs[0].dtype
            # What rounding takes from a logarithm, temperature divides: no float32 formula can give it back.
            allowed = tolerance * max(1, 0.1 / temperature)
            assert error(loss, exact) < allowed, (inputs[0].dtype, temperature)
            assert error(gradient, exact_gradient) < allowed, (inputs[0].dtype, temperature)


@needs_triton
@pytest.mark.parametrize(
    ("n", "c", "scale", "temperatures"),
    [(2, 3, 1, TEMPERATURES), (70, 21, 0.1, (0.01, 0.7)), (67, 21, 4, TEMPERATURES), (67, 130, 1, (0.01, 1.0))],
)
def test_triton_is_the_definition(n, c, scale, temperatures):
    views32 = views(n, c, scale, dtype=torch.float32)
    for temperature in temperatures:
        exact, exact_gradient = loss_and_gradient(*(z.double() for z in views32), definition, temperature=temperature)
        loss, gradient = loss_and_gradient(*views32, temperature=temperature, backend="triton")
        allowed = 1e-5 * max(1, 0.1 / temperature)
        assert error(loss, exact) < allowed, temperature
        assert error(gradient, exact_gradient) < allowed, temperature


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_reference_is_the_definition(temperature):
    z1, z2 = views(37, 8, scale=2)
    options = {"temperature": temperature, "beta": 2.0, "floor": 0.3}
    loss, gradient = loss_and_gradient(z1, z2, backend="reference", **options)
    exact, exact_gradient = loss_and_gradient(z1, z2, definition, **options)
    assert error(loss, exact) < 1e-12
    assert error(gradient, exact_gradient) < 1e-11


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_options_are_used(backend):
    z1, z2 = views(37, 8, scale=2, dtype=torch.float32)
    first, second, _ = simplex_tiled.posteriors(z1, z2, 0.8)
    assert 0.1 < (37 * first @ second.T < 4).float().mean() < 0.9  # the floors act here and there
    for options in ({"beta": 3.0}, {"floor": 4.0}, {"beta": 2.0, "floor": 5.0, "temperature": 0.3}):
        options = {"temperature": 1.0, **options}
        exact, exact_gradient = loss_and_gradient(z1.double(), z2.double(), definition, **options)
        loss, gradient = loss_and_gradient(z1, z2, backend=backend, **options)
        assert error(loss, exact) < 1e-5
        assert error(gradient, exact_gradient) < 1e-5


@pytest.mark.parametrize("temperature", [0.01, 0.4, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_gradcheck(n, temperature, tile):
    tile(3, 2)
    inputs = [z.requires_grad_() for z in views(n, 3)]
    assert torch.autograd.gradcheck(lambda z1, z2: simplex_loss(z1, z2, temperature=temperature), inputs)


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_identical_rows_and_a_single_pair(backend):
    z = views(1, 6, dtype=torch.float32)[0].expand(50, 6)
    for temperature in (0.01, 1.0):
        loss, gradient = loss_and_gradient(z, z, temperature=temperature, backend=backend)
        assert math.isclose(loss.item(), math.log(50), rel_tol=1e-5)
        assert gradient.abs().max() < 1e-6 * max(1, 0.1 / temperature)
        loss, gradient = loss_and_gradient(*views(1, 6, dtype=torch.float32), temperature=temperature, backend=backend)
        assert loss == 0
        assert not gradient.any()


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
def test_no_gradient_where_the_floor_acts(backend):
    z1, z2 = views(12, 6, dtype=torch.float32)
    for temperature in (0.01, 0.5):
        loss, gradient = loss_and_gradient(z1, z2, temperature=temperature, floor=12.0, backend=backend)
        assert math.isclose(loss.item(), math.log(12), rel_tol=1e-5)
        assert not gradient.any()
        loss, gradient = loss_and_gradient(z1, z2, temperature=temperature, floor=1.0, backend=backend)
        assert gradient.any()


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_posteriors_of_rows_far_below_zero(backend):
    # exp(0.8 * -200) is 0 in float32, and softplus with it.
    z1, z2 = views(20, 8, dtype=torch.float32)
    z1, z2 = z1 - torch.linspace(0, 200, 20)[:, None], z2 - torch.linspace(200, 0, 20)[:, None]
    exact, exact_gradient = loss_and_gradient(z1.double(), z2.double(), definition, temperature=1.0)
    loss, gradient = loss_and_gradient(z1, z2, backend=backend)
    assert error(loss, exact) < 1e-5  # what rounding leaves of a number that is 200 too low
    assert error(gradient, exact_gradient) < 1e-4
    assert gradient.abs().amin(1).max() > 0


def test_slope_and_logarithm_of_softplus_to_the_last_digit():
    x = torch.cat([torch.linspace(-40, 40, 4001, dtype=torch.float64), torch.tensor([-1e30, -700.0, -12.0, 0.0, 1e30])])
    x = x.requires_grad_()
    found = simplex_tiled.log_softplus(x, 1.0)
    (derivative,) = torch.autograd.grad(found.sum(), x)
    e = (-x.abs()).exp().detach()
    softplus = x.detach().clamp_min(0) + torch.log1p(e)
    near = x > -600
    assert torch.allclose(found[near], softplus[near].log(), rtol=1e-14, atol=1e-15)
    assert torch.equal(found[~near], x[~near])
    slope = torch.where(x < 0, e, 1) / (1 + e) / softplus
    for some in (derivative, simplex_tiled._slope(x.detach(), 1.0)):
        assert torch.allclose(some[near], slope[near], rtol=1e-13, atol=0)
        assert (some[~near] == torch.tensor([1.0, 1.0], dtype=torch.float64)).all()


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
@pytest.mark.parametrize("value", [1e30, -1e30, 3e38, -3e38])
def test_huge_values_and_rows_of_zeros(backend, value):
    z1, z2 = views(20, 8, dtype=torch.float32)
    z1[3], z2[3], z1[5, 2], z2[7] = 0, 0, value, value
    for temperature, beta in ((0.01, 0.8), (1.0, 5.0)):
        loss, gradient = loss_and_gradient(z1, z2, temperature=temperature, beta=beta, backend=backend)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0])  # sums of logarithms, of powers, of the ratios themselves
@pytest.mark.parametrize("n", [1, 20])
def test_nan_comes_out_as_nan(backend, temperature, n):
    for c in (8, 32):  # with columns behind the last one, and without
        for view in (0, 1):
            for place in (slice(3, 4), slice(None)):
                z = views(n, c, dtype=torch.float32)
                z[view][n // 2, place] = math.nan
                loss, gradient = loss_and_gradient(*z, temperature=temperature, backend=backend)
                assert loss.isnan()
                assert gradient[n // 2 + view * n].isnan().all()
                if n > 1 or backend != "reference":  # a single ratio of NaN: clamp_min's derivative is 0
                    assert gradient[n // 2 + (1 - view) * n].isnan().all()  # its partner


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_late_in_training_the_gradient_keeps_its_digits(backend):
    z1 = 9 * torch.nn.functional.one_hot(torch.arange(40), 40) - 6.0 + 0.1 * views(40, 40)[0]
    z2 = z1 + 0.01 * views(40, 40, seed=1)[0]
    z1, z2 = z1.float(), z2.float()
    exact, exact_gradient = loss_and_gradient(z1.double(), z2.double(), definition, temperature=0.3)
    loss, gradient = loss_and_gradient(z1, z2, temperature=0.3, backend=backend)
    _, plain = loss_and_gradient(z1, z2, temperature=0.3, backend="reference")
    assert exact < 1e-4
    assert error(loss, exact) < 1e-5
    assert error(gradient, exact_gradient) < 1e-5
    assert error(plain, exact_gradient) > 1e-3  # the reason for keeping the positives apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["tiled", TRITON, "reference"])
def test_half_precision_is_computed_in_float32(dtype, backend):
    z1, z2 = views(37, 8, dtype=dtype)
    loss, gradient = loss_and_gradient(z1, z2, temperature=0.5, backend=backend)
    exact, exact_gradient = loss_and_gradient(z1.double(), z2.double(), definition, temperature=0.5)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert error(loss, exact) < 1e-5
    assert error(gradient, exact_gradient) < torch.finfo(dtype).eps


def test_autocast_changes_nothing():
    z1, z2 = views(37, 8, dtype=torch.float32)
    for backend in ("tiled", "reference"):
        expected = loss_and_gradient(z1, z2, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            found = loss_and_gradient(z1, z2, backend=backend)
        assert torch.equal(found[0], expected[0])
        if backend == "tiled":  # the reference's backward pass is autograd's own
            assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_strided_inputs_stay_as_they_are(backend):
    z1, z2 = views(37, 8, dtype=torch.float32)
    expected = loss_and_gradient(z1, z2, temperature=0.5, backend=backend)
    stacked, transposed = torch.stack([z1, z2], dim=2), z2.T.contiguous()
    found = loss_and_gradient(stacked[..., 0], transposed.T, temperature=0.5, backend=backend)
    assert error(found[0], expected[0]) < 1e-6
    assert error(found[1], expected[1]) < 1e-6
    for copy, original in zip((stacked[..., 0], transposed.T), views(37, 8, dtype=torch.float32), strict=True):
        assert torch.equal(copy, original)


@pytest.mark.parametrize("backend", ["tiled", TRITON])
def test_upstream_gradient_and_views_without_one(backend):
    z1, z2 = (z.to(TRITON_DEVICE) for z in views(37, 8, dtype=torch.float32))
    _, gradient = loss_and_gradient(z1, z2, backend=backend)
    z1.requires_grad_()
    (3 * simplex_loss(z1, z2, backend=backend)).backward()
    assert error(z1.grad.cpu(), 3 * gradient[:37]) < 1e-6
    assert not simplex_loss(z1.detach(), z2, backend=backend).requires_grad


def test_never_holds_the_matrix():
    z1, z2 = views(2048, 32, dtype=torch.float32)
    for temperature in (0.01, 1.0):
        with LargestTensor() as tiled:
            loss_and_gradient(z1, z2, temperature=temperature)
        assert tiled.elements <= 2048**2 // 16
    with LargestTensor() as reference:
        loss_and_gradient(z1, z2, backend="reference")
    assert reference.elements >= 2048**2


@pytest.mark.parametrize(
    ("z1", "z2", "options", "message"),
    [
        (torch.ones(4, 8), torch.ones(5, 8), {}, r"shapes are torch.Size\(\[4, 8\]\) and torch.Size\(\[5, 8\]\)"),
        (torch.ones(4), torch.ones(4), {}, r"z1 has shape \[4\], expected \[N, C\]"),
        (torch.ones(4, 8), torch.ones(0, 8), {}, r"z2 has shape \[0, 8\], expected \[N, C\] with N >= 1"),
        (torch.ones(4, 8), torch.ones(4, 8).double(), {}, "dtypes are torch.float32 and torch.float64"),
        (torch.ones(4, 8).long(), torch.ones(4, 8).long(), {}, "z1 has dtype torch.int64, expected a floating"),
        (torch.ones(4, 8), torch.ones(4, 8), {"temperature": 0.0}, "temperature is 0.0, expected a finite"),
        (torch.ones(4, 8), torch.ones(4, 8), {"beta": -1}, "beta is -1"),
        (torch.ones(4, 8), torch.ones(4, 8), {"floor": math.nan}, "floor is nan"),
        (torch.ones(4, 8), torch.ones(4, 8), {"backend": "cuda"}, "'cuda', expected one of auto, triton"),
        (torch.ones(4, 8).double(), torch.ones(4, 8).double(), {"backend": "triton"}, "no float64 inputs"),
    ],
)
def test_wrong_inputs_are_named(z1, z2, options, message):
    with pytest.raises(ValueError, match=message):
        simplex_loss(z1, z2, **options)


# Several ranks. A rank takes seconds to start, so one start serves all combinations.

TRITON_ON_RANKS = triton_is_installed() and not torch.cuda.is_available()  # gloo and the interpreter: on the CPU
COMBINATIONS = [
    (dtype, backend, temperature)
    for dtype in (torch.float32, torch.float64)
    for backend in ("tiled", "reference", "triton")
    for temperature in (0.05, 1.0)
    if (dtype, backend) != (torch.float64, "triton") and not (backend == "triton" and not TRITON_ON_RANKS)
]
PAIRS_A_RANK = 7


def encode(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The whole batch of both views, and a linear encoder whose gradient the ranks average."""
    x1, x2 = views(n, 6, noise=2, dtype=dtype)
    encoder, _ = views(6, 5, dtype=dtype, seed=1)
    return x1, x2, encoder.requires_grad_()


def share_of_a_rank(group: dist.ProcessGroup) -> list[tuple[Tensor, Tensor, Tensor]]:
    simplex_tiled.TILE_ROWS, simplex_tiled.TILE_COLUMNS = 4, 3
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    mine = slice(rank * PAIRS_A_RANK, (rank + 1) * PAIRS_A_RANK)
    shares = []
    for dtype, backend, temperature in COMBINATIONS:
        x1, x2, encoder = encode(world * PAIRS_A_RANK, dtype)
        z1, z2 = x1[mine] @ encoder, x2[mine] @ encoder
        loss = simplex_loss(z1, z2, temperature=temperature, floor=3.0, group=group, backend=backend)
        *rows, gradient = torch.autograd.grad(loss, (z1, z2, encoder))
        dist.all_reduce(gradient, group=group)
        shares.append((loss.detach(), torch.stack(rows), gradient / world))
    return shares


def refusal_of_unequal_batches(group: dist.ProcessGroup) -> str:
    with pytest.raises(ValueError, match="different shape") as refusal:
        simplex_loss(*views(4 + dist.get_rank(group), 3), group=group)
    return str(refusal.value)


def on_ranks(group: dist.ProcessGroup) -> tuple:
    importlib.import_module("tests.interpreter")  # pytest does it for its own process only
    pair = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match="not a member of the group"):
            simplex_loss(*views(2, 2), group=pair)
    return (
        share_of_a_rank(group),
        share_of_a_rank(pair) if dist.get_rank() > 0 else None,
        refusal_of_unequal_batches(group),
    )


def assert_shares_of_the_whole_batch(shares: list[list[tuple[Tensor, Tensor, Tensor]]]) -> None:
    world = len(shares)
    for case, (dtype, backend, temperature) in enumerate(COMBINATIONS):
        x1, x2, encoder = encode(world * PAIRS_A_RANK, dtype)
        z1, z2 = x1 @ encoder, x2 @ encoder
        whole = simplex_loss(z1, z2, temperature=temperature, floor=3.0, backend="reference")
        *rows, gradient = torch.autograd.grad(whole, (z1, z2, encoder))
        tolerance = (1e-5 if dtype == torch.float32 else 1e-9) * max(1, 0.1 / temperature)
        for rank, share in enumerate(shares):
            loss, rank_rows, rank_gradient = share[case]
            mine = slice(rank * PAIRS_A_RANK, (rank + 1) * PAIRS_A_RANK)
            what = (world, rank, dtype, backend, temperature)
            assert error(loss, whole.detach()) < tolerance, what
            assert error(rank_rows / world, torch.stack(rows)[:, mine]) < tolerance, what
            assert error(rank_gradient, gradient) < tolerance, what


def test_two_or_three_ranks_are_one_process_and_refuse_unequal_batches():
    of_three, (_, *of_two), refusals = zip(*run_ranks(3, on_ranks), strict=True)
    assert_shares_of_the_whole_batch(of_three)
    assert_shares_of_the_whole_batch(of_two)
    for message in refusals:
        assert "[[4, 3, 8], [5, 3, 8], [6, 3, 8]]" in message
