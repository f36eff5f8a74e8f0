"""The part of `benchmarks/gpu.py` that trains: whole steps on resident crops, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_cases import fused_ntxent, ntxent_run, plain_ntxent
from benchmarks.gpu_kernels import measure
from benchmarks.gpu_record import Record
from benchmarks.gpu_step import BareStep, Shape, captured, in_turns, memory, plain_loss
from kernels.ntxent import ntxent

SECONDS = 4.0  # of timing, a row
COMPILING = 40.0  # seconds at least: a row that is killed in the making says nothing
RESNET50 = Shape("resnet50", 224, 256)
RESNET18 = Shape("resnet18", 32, 512)
SMOKE = Shape("resnet8x4", 8, 4)
Row = dict[str, Any]


def run_resnet50(record: Record, device: torch.device, smoke: bool) -> None:
    run_training(record, device, replace(SMOKE, images=2) if smoke else RESNET50, (4,) if smoke else (512, 1024), smoke)


def run_resnet18(record: Record, device: torch.device, smoke: bool) -> None:
    run_training(record, device, SMOKE if smoke else RESNET18, (8,) if smoke else (256, 1024), smoke)


def run_training(record: Record, device: torch.device, shape: Shape, batches: tuple[int, ...], smoke: bool) -> None:
    """All rows of one encoder, the quick ones first and what is compiled last: time may run out before the end.

    Args:
        shape: of the rows that compare variants.
        batches: images a step of the rows that show what memory it takes.
    """
    seconds, compiler = (0.0, "eager") if smoke else (SECONDS, "inductor")
    others = [replace(shape, images=images) for images in batches]
    kept: list[BareStep] = []

    def of(shape: Shape, **options: Any) -> list[Row]:
        return [step_row(record, BareStep(shape, device, **options), seconds)]

    def compiled_step() -> BareStep:  # once, for two variants: it takes a minute
        if not kept:
            kept.append(BareStep(shape, device, compiled=compiler))
        return kept[0]

    add = partial(_add, record)
    add(shape, "eager", lambda: step_rows(record, BareStep(shape, device), seconds))
    for other in others:
        add(other, "eager", partial(of, other))
    add(shape, "eager, plain NT-Xent", partial(of, shape, loss=plain_loss()))
    for each in (shape, *others):
        add(each, "loss alone", partial(loss_rows, device, each))
    add(shape, "eager, one CUDA graph", lambda: [graph_row(record, BareStep(shape, device), seconds)])
    compiling = 0.0 if smoke else COMPILING
    add(shape, "compiled", lambda: step_rows(record, compiled_step(), seconds), needs=compiling)
    add(shape, "compiled, one CUDA graph", lambda: [graph_row(record, compiled_step(), seconds)])
    kept.clear()
    for other in others:
        add(other, "compiled", partial(of, other, compiled=compiler), needs=compiling)


def _add(record: Record, shape: Shape, variant: str, measured: Callable[[], list[Row]], *, needs: float = 0.0) -> None:
    """Rows of one variant, each with its case's name, or one row that says what is missing; it ``needs`` seconds."""
    if not record.wanted(f"{shape.name}, {variant}"):
        return
    found: list[Row] = []

    def attempt() -> Row:
        found.extend(measured())
        return found[0]

    first = record.attempt(attempt, seconds=needs)
    for row in found or [first]:
        row = {"case": shape.name, "variant": variant} | row
        record.add("training", row)
        print(describe(row))


def step_rows(record: Record, step: BareStep, seconds: float) -> list[Row]:
    """A step against its own encoder, and one row for each of its parts."""
    whole = step_row(record, step, seconds)
    parts = step.parts()
    spent = in_turns({"step": step, **parts, "draws on the host": step.draw}, step.device, 2 * seconds)
    rest = spent["step"] - sum(spent[name] for name in parts)
    shares: list[Row] = [
        {"kind": "part", "part": name, "ms": ms, "step_ms": spent["step"], "share": ms / spent["step"]}
        for name, ms in [*spent.items(), ("rest", rest)]
        if name != "step"
    ]
    return [whole, *shares]


def step_row(record: Record, step: BareStep, seconds: float) -> Row:
    """The step beside its own encoder, in turns, and the memory that it takes."""
    step()  # the optimizer's state, and what is compiled or tuned
    with memory(step.device) as used:
        step()
    spent = in_turns({"step": step, "encoder": step.encoder(step.views())}, step.device, seconds)
    return figures(record, step, spent["step"], spent["encoder"]) | used


def graph_row(record: Record, step: BareStep, seconds: float) -> Row:
    """One CUDA graph of the whole step or, where that cannot be captured, of all but the photometry and the scalars.

    The encoder that it is compared with is launched operation by operation.
    """
    if step.device.type != "cuda":
        return {"missing": "a CUDA graph needs a CUDA device"}
    step.to_device()
    with memory(step.device) as used:  # replays allocate nothing
        held, problem = "the whole step", ""
        try:
            run = captured(step)
        except RuntimeError as error:
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        if problem:  # here, where no traceback holds the step's tensors any more
            run, held = _captured_model(step), "all but the photometry and the log's scalars"
    spent = in_turns({"step": run, "encoder": step.encoder(step.views())}, step.device, seconds)
    return figures(record, step, spent["step"], spent["encoder"]) | used | {"captured": held, "problem": problem}


def _captured_model(step: BareStep) -> Callable[[], None]:
    """The photometry launched as always, into the tensor that a graph of the rest reads."""
    step.optimizer.zero_grad(set_to_none=True)
    step.own_loss = lambda embeddings: ntxent(*embeddings["z"].unbind(0), temperature=step.method.temperature)
    views = step.views().clone()
    replay = captured(lambda: step.train_on(views))

    def run() -> None:
        views.copy_(step.views())
        replay()

    return run


def figures(record: Record, step: BareStep, ms: float, encoder_ms: float) -> Row:
    """What follows from a step's milliseconds. MFU: FLOPs of the model over what the rate would allow in that time."""
    limits = record.found.get("limits", {})
    tflop_s = step.flops / ms / 1e9
    measured, sheet = limits.get("matmul_bf16_tflop_s"), limits.get("data_sheet_bf16_tflop_s")
    return {
        "kind": "step",
        "images": step.shape.images,
        "views": step.shape.views,
        "ms": ms,
        "encoder_ms": encoder_ms,
        "over_encoder": ms / encoder_ms - 1,
        "images_per_second": 1000 * step.shape.images / ms,
        "views_per_second": 1000 * step.shape.views / ms,
        "flops": step.flops,
        "encoder_flops": step.encoder_flops,
        "tflop_s": tflop_s,
        "mfu_of_measured": tflop_s / measured if measured else None,
        "mfu_of_data_sheet": tflop_s / sheet if sheet else None,
    }


def loss_rows(device: torch.device, shape: Shape) -> list[Row]:
    """NT-Xent forward and backward at a step's size, D = 128, bfloat16: fused, and plain under autocast.

    ``matrix_mb``: what the similarities alone take in float32.
    """
    row: Row = {"kind": "loss", "rows": shape.views, "matrix_mb": 4 * shape.views**2 / 1e6}
    for name, loss in (("fused", fused_ntxent), ("plain", plain_ntxent)):
        found = measure(partial(ntxent_run, loss, shape.views, 128, device), device)
        row |= {f"{name}_ms": found["ms"], f"{name}_peak_mb": found.get("peak_mb")}
    return [row]


def describe(row: Row) -> str:
    if "missing" in row:
        return f"{row['case']}, {row['variant']}: {row['missing']}"
    if row["kind"] == "part":
        return f"    {row['part']:20s} {row['ms']:9.3f} ms {row['share']:7.1%} of the step"
    if row["kind"] == "loss":
        peaks = "  ".join(
            f"{name} {row[f'{name}_ms']:.3f} ms" + (f" {peak:,.1f} MB" if peak is not None else "")
            for name in ("fused", "plain")
            for peak in [row[f"{name}_peak_mb"]]
        )
        return f"    NT-Xent of {row['rows']} rows: {peaks}"
    mfu = ", ".join(
        f"MFU {row[key]:.1%} of the {of}"
        for key, of in (("mfu_of_measured", "measured rate"), ("mfu_of_data_sheet", "data sheet's"))
        if row[key] is not None
    )
    peak = f", {row['peak_gb']:.2f} GB" if row["peak_gb"] is not None else ""
    held = f" ({row['captured']})" if "captured" in row else ""
    return (
        f"{row['case']}, {row['variant']}{held}: {row['ms']:.2f} ms, {row['images_per_second']:,.0f} images/s"
        f" = {row['views_per_second']:,.0f} views/s, {row['over_encoder']:+.1%} over its encoder, {mfu}{peak}"
    )
