"""Out of memory: what was asked for, what there is, and the batch that would fit, by measuring two small ones."""

from __future__ import annotations

import contextlib
import gc
import re
import resource
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.loading import ranks_of_this_machine
from pipelines.resident import ResidentLoader

if TYPE_CHECKING:
    from trainers.pretrain import Run

_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "bad_alloc")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_MARGIN = 0.1  # of what is free: convolutions' workspaces, fragments, gathered embeddings


def is_out_of_memory(error: BaseException) -> bool:
    """Allocators of GPUs and CPUs, and the libraries above them, each say it in their own words."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


@dataclass(frozen=True, slots=True)
class Room:
    """Memory of the training device, bytes."""

    name: str
    total: int  # the limit that comes first
    free: int


@dataclass(frozen=True, slots=True)
class Need:
    """What a step takes of a rank, bytes: ``fixed + per_image × micro-batch + views × images of the whole share``."""

    fixed: float
    per_image: float
    views: float

    def of(self, share: int, accumulation: int) -> float:
        return self.fixed + self.per_image * share / accumulation + self.views * share


def memory_message(error: BaseException, run: Run) -> str:
    """One message for the user. What the failed step held is let go, and two small batches are measured.

    Called on the rank that failed alone: nothing here waits for another.
    """
    asked = _asked(str(error))
    traceback.clear_frames(error.__traceback__)  # they hold the step's activations
    gc.collect()
    device, engine = run.engine.ranks.device, run.engine.config
    if device.type == "cuda":
        torch.cuda.empty_cache()
    share = run.log.batch_size // run.engine.ranks.world_size
    told = f"out of memory on {device}" + (f", which {_size(asked)} more were asked of" if asked else "")
    try:
        room = _room(device)
        told += f"; {room.name} has {_size(room.total)}"
    except (OSError, RuntimeError):
        room = None
    told += f", the batch is {share} images a rank"
    told += f" in {engine.accumulation} micro-batches" if engine.accumulation > 1 else ""
    need = None
    with contextlib.suppress(RuntimeError, MemoryError, ValueError, TypeError):  # there is none left even for that
        need = _need(run, share // engine.accumulation)
    ways = _ways(run, share, need, room) if need is not None and room is not None else (
        "choose a smaller batch_size, or keep it and its loss with a larger engine.accumulation"
    )  # fmt: skip
    return f"{told}; {ways}; python -m tools.tune RECIPE --batch-size measures what fits"


def _ways(run: Run, share: int, need: Need, room: Room) -> str:
    ranks, accumulation = run.engine.ranks.world_size, run.engine.config.accumulation
    budget = room.free * (1 - _MARGIN)
    fits = largest_share(need, budget, share, accumulation)
    if fits == share:
        return (
            f"by what small batches take, this one should fit into the {_size(room.free)} that are free now: something"
            " else took the memory meanwhile"
        )
    if not fits:
        return f"not even {accumulation} images fit into the {_size(room.free)} that are free without them"
    told = f"by what small batches take, batch_size={fits * ranks} would fit: set it"
    for parts in range(accumulation + 1, share + 1):
        if share % parts == 0 and need.of(share, parts) <= budget:
            return f"{told}, or keep batch_size={run.log.batch_size} and its loss with engine.accumulation={parts}"
    return told


def largest_share(need: Need, budget: float, share: int, accumulation: int) -> int:
    """The most images of a rank, up to ``share``, that fit; a multiple of 8 × ``accumulation`` where that many do."""
    if need.of(share, accumulation) <= budget:
        return share
    each = need.per_image / accumulation + need.views
    most = max(0, int((budget - need.fixed) / each))
    unit = accumulation * (8 if most >= 8 * accumulation else 1)
    return most // unit * unit


def _need(run: Run, micro_batch: int) -> Need:
    """From the forward and backward passes of two small batches, in eval mode: without a word to other ranks."""
    loader: Any = run.loader
    pixels = len(loader.plan) * 3 * loader.size**2
    large = max(4, min(micro_batch // 4, 32 if run.engine.ranks.device.type == "cuda" else 8))
    small = large // 2
    parameters = [p for p in run.method.parameters() if p.requires_grad]
    training = run.method.training
    run.method.eval()
    try:
        peaks = [_peak(lambda n=n: _pass(run, parameters, n), run.engine.ranks.device) for n in (small, large)]
    finally:
        run.method.train(training)
    per_image = (peaks[1] - peaks[0]) / (large - small)
    fixed = max(0.0, peaks[0] - per_image * small)
    if not run.engine.optimizer_state():
        weights = sum(p.numel() * p.element_size() for p in parameters)
        fixed += weights * (2 if isinstance(run.engine.optimizer, torch.optim.Adam) else 1)
    ahead = 1 if isinstance(loader, ResidentLoader) else loader.config.ahead + 2
    return Need(fixed, per_image, pixels * (4 + ahead))


def _pass(run: Run, parameters: list[torch.nn.Parameter], images: int) -> None:
    loader: Any = run.loader
    method, device = run.method, run.engine.ranks.device
    views = torch.rand(len(loader.plan), images, 3, loader.size, loader.size, device=device)
    bfloat16 = run.engine.config.precision == "bfloat16" or (
        run.engine.config.precision == "auto" and device.type == "cuda"
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        embedded = method.embed(views.chunk(method.view_parts)[0])
        total = torch.stack([v.float().mean() for v in embedded.values() if v.requires_grad]).sum()
    torch.autograd.grad(total, parameters, allow_unused=True)


def _peak(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors that ``work`` holds at a time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with _Counted() as counted:
        work()
    return counted.peak


class _Counted(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside, and the most that lived at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(v.untyped_storage()) for v in args if isinstance(v, Tensor)}
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if id(storage) not in given and storage not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.now -= size


def _room(device: torch.device) -> Room:
    """What is free for this process now, with what its allocator keeps."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Room(torch.cuda.get_device_name(device), total, free + kept)
    memory = psutil.virtual_memory()
    rooms = [Room("the machine", memory.total, memory.available // ranks_of_this_machine())]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        rooms.append(Room("the process (ulimit -v)", limit, limit - psutil.Process().memory_info().vms))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        most = int((group / "memory.max").read_text())  # "max": there is none
        rooms.append(Room("the container", most, most - int((group / "memory.current").read_text())))
    return min(rooms, key=lambda room: room.free)


def _asked(message: str) -> int | None:
    """Bytes, from what PyTorch's allocators say."""
    found = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)", message)
    return round(float(found[1].rstrip(".")) * _UNITS[found[2]]) if found else None


def _size(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
