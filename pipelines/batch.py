"""What flows from every loader into every method."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class ViewBatch:
    """One rank's views of one micro-batch, on the training device."""

    views: Tensor  # [V, N, 3, H, W] normalised, channels_last
    labels: Tensor  # [N] int64, -1 where unknown; [N, C] float32 multi-hot for multi-label sets
    indices: Tensor  # [N] int64 position in the source
    host_indices: Tensor | None = None  # the same on the CPU, where draws are made: reading those back would wait

    def indices_on_host(self) -> Tensor:
        return self.indices.cpu() if self.host_indices is None else self.host_indices
