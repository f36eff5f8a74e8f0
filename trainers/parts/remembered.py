"""What was computed of an image once and is the same whenever it is seen again."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.ranks import gather_rows
from kernels.transfer import to_device


class RememberedRows:
    """A table [images, width] of float16, on the device of what is put in, filled as images are seen.

    The same on every rank, since each puts in what all ranks have just seen. It belongs to no checkpoint: a resumed run
    fills it anew. While it has gaps, several ranks read each other's indices back from the device; then nobody does.

    Args:
        images: how many there are; width: numbers of each.
        most_bytes: a table that would take more is never made, and nothing is remembered.
    """

    def __init__(self, images: int, width: int, most_bytes: float) -> None:
        self.enabled = images * width * 2 <= most_bytes
        self.complete = False
        self._shape = (images, width)
        self._table: Tensor | None = None
        self._seen = torch.zeros(images if self.enabled else 0, dtype=torch.bool)  # on the host

    def look_up(self, indices: Tensor, compute: Callable[[Tensor], Tensor], on_host: Tensor | None = None) -> Tensor:
        """Rows [n, width] float16 of the images at ``indices`` [n]; ``compute`` makes those at places [m] of [n].

        ``on_host``: the same indices on the CPU, which saves a wait for the device.
        """
        if not self.enabled:
            return compute(torch.arange(len(indices), device=indices.device))
        if self.complete:
            return self._of(indices.device)[indices]
        on_host = indices.cpu() if on_host is None else on_host
        unknown = to_device((~self._seen[on_host]).nonzero().squeeze(1), indices.device)
        if len(unknown) == len(indices):
            return compute(unknown)
        rows = self._of(indices.device)[indices]
        if len(unknown):
            rows[unknown] = compute(unknown)
        return rows

    def put(
        self, indices: Tensor, rows: Tensor, group: dist.ProcessGroup | None, on_host: Tensor | None = None
    ) -> None:
        """Remember rows [n, width] of the images at ``indices`` [n], of all ranks; each must call it.

        ``on_host`` as above; with several ranks the others' indices are waited for, until all images were seen.
        """
        if not self.enabled or self.complete:
            return
        rows = rows.half()
        if group is not None:
            indices, rows, on_host = gather_rows(indices, group), gather_rows(rows, group), None
        self._of(rows.device)[indices] = rows
        self._seen[indices.cpu() if on_host is None else on_host] = True
        self.complete = bool(self._seen.all())

    def _of(self, device: torch.device) -> Tensor:
        if self._table is None:
            self._table = torch.zeros(self._shape, dtype=torch.float16, device=device)
        return self._table
