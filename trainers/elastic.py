"""What is the same, and what is not, when a run goes on with another number of ranks or micro-batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainers.engine import EngineConfig


def elastic_remarks(written: Mapping[str, Any], world_size: int, config: EngineConfig, batch_size: int) -> list[str]:
    """For the user: what differs from here on, given a checkpoint's values. Empty if nothing does.

    Images, their order, their views and the loss over the whole batch are the same on any number of ranks.
    """
    ranks_before, parts_before = written["world_size"], written.get("accumulation", config.accumulation)
    if (ranks_before, parts_before) == (world_size, config.accumulation):
        return []
    remarks = [
        f"written by {_cut(ranks_before, parts_before)}, going on with {_cut(world_size, config.accumulation)}:"
        " the same batches in the same order"
    ]
    if written.get("encoder", {}).get("dropout"):
        remarks.append("each rank draws its own dropout: other masks from here on")
    local = config.batchnorm == "local"
    before = batch_size // (parts_before * (ranks_before if local else 1))
    now = batch_size // (config.accumulation * (world_size if local else 1))
    if before != now:
        remarks.append(f"BatchNorm sees {now} images at once, {before} before: its statistics differ from here on")
    elif config.accumulation > 1 and not local:  # each rank cuts its own share into micro-batches
        remarks.append(f"BatchNorm sees {now} images at once as before, but others together")
    return remarks


def _cut(ranks: int, parts: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''}" + (f" × {parts} micro-batches" if parts > 1 else "")
