"""The support set of NNCLR (Dwibedi et al. 2021, arXiv:2104.14548): a ring buffer of normalised past projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.nearest import nearest
from kernels.ranks import check_same_on_ranks, gather_rows, group_or_none

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NORM_FLOOR = 1e-12  # the floor of torch.nn.functional.normalize


class SupportSet(nn.Module):
    """The last `capacity` rows, oldest overwritten first, to be searched for neighbours.

    Rows are normalised when they come in, and never again; a search copies nothing. All state is in buffers, so it
    is saved, restored and moved with the module. Look up before you enqueue: a row would find itself.

    Args:
        capacity: rows kept; best below the size of the data set, or a sample finds its own older projections.
        width: D.
        dtype: of the stored rows: bfloat16, float16 or float32.
    """

    rows: Tensor  # [capacity, D] of norm 1 (or 0); zeros where nothing has been written
    ids: Tensor  # [capacity] int64, of the samples; -1 where nothing has been written
    labels: Tensor  # [capacity] int64, for diagnostics; -1 where unknown
    written_at: Tensor  # [capacity] int64, the number of the enqueue that wrote a row, from 0
    counts: Tensor  # [2] int64: rows ever enqueued, and enqueues

    def __init__(self, capacity: int, width: int, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if capacity < 1 or width < 1:
            raise ValueError(f"a support set has shape [{capacity}, {width}], expected at least one row and one column")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}")
        self.register_buffer("rows", torch.zeros(capacity, width, dtype=dtype))
        self.register_buffer("ids", torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("labels", torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("written_at", torch.full((capacity,), -1, dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        # What `counts` holds on the device, known here too, so that no step has to ask for it.
        self._enqueued, self._enqueues = 0, 0

    @property
    def capacity(self) -> int:
        return len(self.rows)

    @property
    def filled(self) -> int:
        """How many of the first rows hold something."""
        return min(self._enqueued, self.capacity)

    @property
    def is_full(self) -> bool:
        return self._enqueued >= self.capacity

    @torch.no_grad()
    def enqueue(
        self, rows: Tensor, ids: Tensor, labels: Tensor | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        """Normalises rows and writes them over the oldest; of more than `capacity` rows the last are kept.

        Args:
            rows: [N, D], any floating dtype; normalised in float32 (norms below 1e-12 count as 1e-12).
            ids: [N] int64, the samples' positions in the data set.
            labels: [N] int64; None: unknown.
            group: the rows of all its ranks are written, in their order, on every rank alike. Each must bring as
                many.

        Raises:
            ValueError: shapes that do not fit, ranks with batches of different shape, or not a member of the group.
        """
        labels = torch.full_like(ids, -1) if labels is None else labels
        self._check(rows, ids, labels)
        rows = unit_rows(rows).to(self.rows.dtype)
        group = group_or_none(group)
        if group is not None:
            check_same_on_ranks(rows, group)
            # As bytes, because not every backend of torch.distributed sends 16-bit floats.
            rows = gather_rows(rows.contiguous().view(torch.uint8), group).view(self.rows.dtype)
            ids, labels = gather_rows(torch.stack([ids, labels], 1), group).unbind(1)
        brought, kept = len(rows), min(len(rows), self.capacity)
        start = (self._enqueued + brought - kept) % self.capacity
        at_end = min(kept, self.capacity - start)  # the rest goes to the beginning
        for buffer, new in ((self.rows, rows), (self.ids, ids), (self.labels, labels)):
            new = new[brought - kept :]
            buffer[start : start + at_end] = new[:at_end]
            buffer[: kept - at_end] = new[at_end:]
        self.written_at[start : start + at_end] = self._enqueues
        self.written_at[: kept - at_end] = self._enqueues
        self._enqueued += brought
        self._enqueues += 1
        self.counts[0].add_(brought)
        self.counts[1].add_(1)

    @torch.no_grad()
    def nearest(
        self, queries: Tensor, k: int = 1, exclude_ids: Tensor | None = None, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """The k stored rows of largest cosine with each query [N, D]: cosines [N, k] and indices [N, k] into `rows`.

        Only what has been written is searched. Before the set is full (`is_full`) that is a young and small part of
        the data, which NNCLR had better not learn from. Queries are normalised in float32 and then rounded as the
        rows were, the same on all devices.

        Args:
            exclude_ids: [N] int64; rows with a query's id are not its neighbours. Where fewer than k rows remain,
                the rest have cosine -inf and index -1.

        Raises:
            ValueError: fewer than k rows have been written, or shapes do not fit.
        """
        if k > self.filled:
            raise ValueError(f"k={k} neighbours of a support set of which {self.filled} rows are filled; enqueue first")
        exclude = None if exclude_ids is None else (exclude_ids, self.ids[: self.filled])
        queries = unit_rows(queries).to(self.rows.dtype)
        return nearest(queries, self.rows[: self.filled], k=k, exclude=exclude, backend=backend)

    def age(self, indices: Tensor) -> Tensor:
        """How many enqueues ago the rows at these indices were written, any shape; -1 for index -1."""
        return torch.where(indices < 0, -1, self._enqueues - 1 - self.written_at[indices])

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, width={self.rows.shape[1]}, dtype={self.rows.dtype}, filled={self.filled}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._enqueued, self._enqueues = self.counts.tolist()

    def _check(self, rows: Tensor, ids: Tensor, labels: Tensor) -> None:
        if rows.dim() != 2 or rows.shape[1] != self.rows.shape[1] or not rows.is_floating_point():
            raise ValueError(
                f"rows are {list(rows.shape)} {rows.dtype}, expected [N, {self.rows.shape[1]}] and a "
                "floating-point dtype"
            )
        for name, values in (("ids", ids), ("labels", labels)):
            if values.shape != (len(rows),) or values.dtype != torch.int64:
                raise ValueError(f"{name} are {list(values.shape)} {values.dtype}, expected [{len(rows)}] int64")


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [N, D] divided by their norms, in float32. Squares of huge rows do not overflow."""
    rows = rows.to(torch.float32)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(NORM_FLOOR)
    rows = rows / largest
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.maximum(norms, NORM_FLOOR / largest)
