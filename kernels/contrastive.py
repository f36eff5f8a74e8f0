"""Rows against columns: the softmax loss of InfoNCE, MoCo, NNCLR and CLIP, without the matrix of logits.

Each row (anchor) has one positive among the columns (candidates); all other columns are its negatives, one of them
can be left out. The forward pass keeps one sum a row, the backward pass makes the logits again, tile by tile:

    dL_i/da_i = 1/τ [ sum_j P_ij c_j - (1 - P_i+) c_+ ]        with P_ij = exp(a_i.c_j / τ) / l_i, j the negatives of i

and the candidates collect the same terms by columns. 1 - P_i+ is the negatives' share of the sum, never a difference.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backends import choose_backend
from kernels.ntxent import check_temperature
from kernels.ntxent_tiled import HIT_SLACK

# Two float32 tiles, logits and spare, take 512 KB: they stay in the second-level cache of one core.
TILE_ROWS = 256
TILE_COLUMNS = 256


def contrastive_loss(
    anchors: Tensor,
    candidates: Tensor,
    positive: Tensor,
    *,
    temperature: float,
    exclude: Tensor | None = None,
    return_hits: bool = False,
    backend: str = "auto",
) -> Any:
    """Per anchor, minus the log softmax of its positive over the candidates (InfoNCE, van den Oord et al. 2018,
    arXiv:1807.03748, equation 4, with logits a.c / τ).

    Rows are taken as given: normalise them first if the logits shall be cosines / τ.

    Args:
        anchors: [M, D], float16, bfloat16, float32 or float64.
        candidates: [L, D], same dtype and device. Gradients go to both; where one needs none, none is computed.
        positive: [M] int64 or int32, the column that is each row's positive.
        temperature: τ > 0.
        exclude: [M] int64 or int32, a column that each row leaves out (its own copy, say), -1: none. Not its positive.
        return_hits: also tell whose positive has a larger logit than every other candidate.
        backend: "tiled" and "triton" never hold an array of M x L; "reference" does, in plain operations, and is
            there to be compared with; "auto" picks the fastest for the device.

    Returns:
        [M] losses, float64 for float64 inputs and float32 otherwise; with `return_hits` also [M] bool. A positive that
        ties with another candidate is no hit. Gradients have the dtype of their input, and are the same in every run.

    Precision: float32 and accumulated as such, but for the products of "triton", which are of the dtype of the inputs
    (under autocast, its dtype). For float32 inputs these are as good as float32, relative to the largest entries of
    anchors and of candidates; or as good as TF32 if torch.set_float32_matmul_precision allows that. The candidates'
    gradient loses digits of rows whose upstream gradient is below 1e-5 of the largest, and all below 1e-11.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a temperature that is not positive and finite, an
            unknown backend; on a CPU also indices that name no column or exclude a positive (on a GPU looking would
            stall it: there the positives are checked by the device itself, and the others are not).
        TypeError: the temperature is a tensor. To learn one, scale the anchors: they are taken as given.
    """
    _check(anchors, candidates, positive, exclude)
    positive, exclude = positive.long(), None if exclude is None else exclude.long()
    check_temperature(temperature)
    chosen = choose_backend(backend, anchors, candidates)
    product_dtype = anchors.dtype
    if anchors.dtype == torch.float32 and torch.is_autocast_enabled(anchors.device.type):
        product_dtype = torch.get_autocast_dtype(anchors.device.type)
    with torch.autocast(anchors.device.type, enabled=False):
        if chosen == "reference":
            losses, hits = _reference(anchors, candidates, positive, temperature, exclude)
        else:
            function = _FusedContrastive if chosen == "triton" else _TiledContrastive
            losses, hits = function.apply(
                anchors, candidates, positive, temperature, exclude, return_hits, product_dtype
            )
    return (losses, hits) if return_hits else losses


def _reference(
    anchors: Tensor, candidates: Tensor, positive: Tensor, temperature: float, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(anchors)
    logits = anchors.to(dtype) @ candidates.to(dtype).T / temperature
    if exclude is not None:
        columns = torch.arange(len(candidates), device=logits.device)
        logits = logits.masked_fill(columns == exclude[:, None], -math.inf)
    with torch.no_grad():
        others = logits.scatter(1, positive[:, None], -math.inf).amax(1)
        own = logits.gather(1, positive[:, None])[:, 0]
        hits = own - HIT_SLACK[dtype] * own.abs() > others
    return F.cross_entropy(logits, positive, reduction="none"), hits


class _TiledContrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        positive: Tensor,
        temperature: float,
        exclude: Tensor | None,
        return_hits: bool,
        product_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        a, c = _scaled(anchors, candidates, temperature)
        own = (a * c.index_select(0, positive)).sum(1)
        negative = a.new_full((len(a),), -math.inf)
        highest = torch.full_like(negative, -math.inf)
        buffer = a.new_empty(TILE_ROWS * TILE_COLUMNS)
        for rows, columns in _tiles(len(a), len(c)):
            logits = _tile_logits(buffer, a[rows], c[columns])
            _fill_left_out(logits, rows, columns, positive, exclude, -math.inf)
            top = logits.amax(1)
            shift = torch.maximum(highest[rows], top)
            finite = shift.masked_fill(shift == -math.inf, 0)
            total = logits.sub_(finite[:, None]).exp_().sum(1)
            total += (negative[rows] - finite).exp_()
            negative[rows] = total.log_().add_(finite)
            highest[rows] = shift
        margin = negative - own
        ctx.save_for_backward(anchors, candidates, positive, exclude, margin, torch.logaddexp(negative, own))
        ctx.temperature = temperature
        hits = own - HIT_SLACK[own.dtype] * own.abs() > highest if return_hits else None
        if hits is not None:
            ctx.mark_non_differentiable(hits)
        return torch.logaddexp(margin, torch.zeros_like(margin)), hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        anchors, candidates, positive, exclude, margin, log_sums = ctx.saved_tensors
        with torch.autocast(anchors.device.type, enabled=False):
            dtype = _compute_dtype(anchors)
            a, c = _scaled(anchors, candidates, ctx.temperature)
            unscaled = anchors.to(dtype)
            weight = upstream / ctx.temperature
            of_anchors = torch.zeros_like(a) if ctx.needs_input_grad[0] else None
            of_candidates = torch.zeros_like(c) if ctx.needs_input_grad[1] else None
            # A product with denormal numbers is 200 times slower, and nothing this far down reaches the result.
            lowest = 0.9 * math.log(torch.finfo(dtype).tiny)
            buffer = a.new_empty(TILE_ROWS * TILE_COLUMNS)
            for rows, columns in _tiles(len(a), len(c)):
                w = _tile_logits(buffer, a[rows], c[columns])
                w.sub_(log_sums[rows, None]).clamp_(min=lowest).exp_()
                _fill_left_out(w, rows, columns, positive, exclude, 0)
                w.mul_(weight[rows, None])
                if of_anchors is not None:
                    of_anchors[rows].addmm_(w, c[columns])
                if of_candidates is not None:
                    of_candidates[columns].addmm_(w.T, unscaled[rows])
            share = (margin.sigmoid() * weight)[:, None]
            return (
                *_with_positives(of_anchors, of_candidates, unscaled, c, positive, share, anchors.dtype),
                *(None,) * 5,
            )


class _FusedContrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        positive: Tensor,
        temperature: float,
        exclude: Tensor | None,
        return_hits: bool,
        product_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        from kernels.fused import contrastive as fused

        # index_select: unlike [], it refuses negative indices, on the device.
        own = (anchors.float() * candidates.index_select(0, positive).float()).sum(1) / temperature
        x, y = fused.Operand.of(anchors, product_dtype), fused.Operand.of(candidates, product_dtype)
        excluded = torch.full_like(positive, -1) if exclude is None else exclude
        left_out = fused.LeftOut(fused.OF_ROWS, positive.contiguous(), excluded.contiguous())
        rounded_to = torch.float32 if product_dtype == anchors.dtype and (x.split or x.unit == 1.0) else x.rows.dtype
        losses, margin, log_sums, hits = fused.sum_rows(
            x, y, own, left_out, temperature, False, return_hits, HIT_SLACK[rounded_to]
        )
        units = [operand.unit if isinstance(operand.unit, Tensor) else None for operand in (x, y)]
        ctx.save_for_backward(anchors, candidates, *left_out[1:3], margin, log_sums, x.rows, y.rows, *units)
        ctx.split, ctx.temperature = x.split, temperature
        if hits is not None:
            ctx.mark_non_differentiable(hits)
        return losses, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        from kernels.fused import contrastive as fused

        anchors, candidates, positive, excluded, margin, log_sums, *operands = ctx.saved_tensors
        x, y = (
            fused.Operand(rows, ctx.split, 1.0 if unit is None else unit)
            for rows, unit in zip(operands[:2], operands[2:], strict=True)
        )
        left_out = fused.LeftOut(fused.OF_ROWS, positive, excluded)
        with torch.autocast(anchors.device.type, enabled=False):
            of_anchors = of_candidates = None
            if ctx.needs_input_grad[0]:
                pulled = fused.pull(x, y, log_sums, torch.ones_like(log_sums), left_out, ctx.temperature, False)
                of_anchors = pulled.sum(0)[:, : anchors.shape[1]] * (upstream[:, None] * (y.unit / ctx.temperature))
            if ctx.needs_input_grad[1]:
                # Weights of at most 1 for the product in half precision, whatever the scale of the upstream gradient.
                largest = upstream.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
                weights = (upstream / largest).contiguous()
                mirrored = left_out._replace(kind=fused.OF_COLUMNS)
                pulled = fused.pull(y, x, log_sums, weights, mirrored, ctx.temperature, False)
                of_candidates = pulled.sum(0)[:, : candidates.shape[1]] * (largest * x.unit / ctx.temperature)
            share = (margin.sigmoid() * upstream / ctx.temperature)[:, None]
            return (
                *_with_positives(
                    of_anchors, of_candidates, anchors.float(), candidates, positive, share, anchors.dtype
                ),
                *(None,) * 5,
            )


def _with_positives(
    of_anchors: Tensor | None,
    of_candidates: Tensor | None,
    anchors: Tensor,
    candidates: Tensor,
    positive: Tensor,
    share: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Takes the positives' share [M, 1] from what the negatives gave, in place."""
    if of_anchors is not None:
        of_anchors.addcmul_(share, candidates[positive].to(share.dtype), value=-1)
        of_anchors = of_anchors.to(dtype)
    if of_candidates is not None:
        # Several rows may have one positive. Either sums them in the same order in every run, but only on its device.
        own = share * anchors.to(share.dtype) * -1
        if own.device.type == "cpu":
            of_candidates.index_add_(0, positive, own)
        else:
            of_candidates.index_put_((positive,), own, accumulate=True)
        of_candidates = of_candidates.to(dtype)
    return of_anchors, of_candidates


class _Tiles(NamedTuple):
    rows: slice
    columns: slice


def _tiles(rows: int, columns: int) -> list[_Tiles]:
    return [
        _Tiles(slice(top, min(top + TILE_ROWS, rows)), slice(left, min(left + TILE_COLUMNS, columns)))
        for top in range(0, rows, TILE_ROWS)
        for left in range(0, columns, TILE_COLUMNS)
    ]


def _scaled(anchors: Tensor, candidates: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(anchors)
    return anchors.to(dtype) / temperature, candidates.to(dtype)


def _tile_logits(buffer: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    logits = buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
    return torch.mm(rows, columns.T, out=logits)


def _fill_left_out(
    values: Tensor, rows: slice, columns: slice, positive: Tensor, exclude: Tensor | None, value: float
) -> None:
    """Overwrite what a tile holds of its rows' positives and excluded columns."""
    for indices in (positive, exclude):
        if indices is not None:
            places = indices[rows] - columns.start
            inside = (places >= 0) & (places < values.shape[1])
            places = places.clamp(0, values.shape[1] - 1)[:, None].long()  # of rows without one, any: it stays as it is
            values.scatter_(1, places, torch.where(inside[:, None], value, values.gather(1, places)))


def _compute_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _check(anchors: Tensor, candidates: Tensor, positive: Tensor, exclude: Tensor | None) -> None:
    for name, rows in (("anchors", anchors), ("candidates", candidates)):
        if rows.dim() != 2 or 0 in rows.shape:
            raise ValueError(f"{name} has shape {list(rows.shape)}, expected two dimensions, neither empty")
        if not rows.is_floating_point():
            raise ValueError(f"{name} has dtype {rows.dtype}, expected a floating-point dtype")
    if anchors.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"anchors [M, D] and candidates [L, D] must share D, got {list(anchors.shape)} and {list(candidates.shape)}"
        )
    for what in ("dtype", "device"):
        first, second = getattr(anchors, what), getattr(candidates, what)
        if first != second:
            raise ValueError(f"anchors and candidates differ in {what}: {first} and {second}")
    for name, indices in (("positive", positive), ("exclude", exclude)):
        if indices is None:
            continue
        if indices.shape != anchors.shape[:1] or indices.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{name} is {list(indices.shape)} {indices.dtype}, expected [{len(anchors)}] int64 or int32, one a row"
            )
        if indices.device != anchors.device:
            raise ValueError(f"{name} is on {indices.device}, expected {anchors.device} as the anchors")
        lowest = 0 if name == "positive" else -1
        if indices.device.type == "cpu" and not bool(((indices >= lowest) & (indices < len(candidates))).all()):
            raise ValueError(
                f"{name} names columns {int(indices.min())} to {int(indices.max())}, "
                f"expected {lowest} to {len(candidates) - 1}"
            )
    if exclude is not None and exclude.device.type == "cpu" and bool((exclude == positive).any()):
        raise ValueError(f"exclude leaves out the positive of row {int((exclude == positive).nonzero()[0])}")
