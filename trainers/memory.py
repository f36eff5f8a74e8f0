"""Out of memory: what was asked for, what there is, and the batch that would fit, by the sizes of a step's tensors."""

from __future__ import annotations

import contextlib
import gc
import re
import resource
import traceback
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.loading import ranks_of_this_machine
from pipelines.resident import ResidentLoader

if TYPE_CHECKING:
    from trainers.pretrain import Run

_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "bad_alloc")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# Of what is free: workspaces of convolutions, fragments, gathered embeddings. A heap of a CPU is in more pieces.
_MARGIN = {"cpu": 0.25, "cuda": 0.1}
_MARGIN_KEPT = 0.4  # with engine.keep_memory: what is left of the blocks that were cut
_LIBRARIES = {"cpu": 128e6, "cuda": 64e6}  # bytes: what threads and libraries take from the first step on


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


def memory_message(error: BaseException, run: Run, before: Room | None) -> str:
    """One message for the user; ``before``: what was free before the first step.

    Called on the rank that failed alone: nothing here waits for another, nor takes memory.
    """
    asked, engine = _asked(str(error)), run.engine.config
    traceback.clear_frames(error.__traceback__)  # they hold the failed step's tensors
    gc.collect()
    share = run.log.batch_size // run.engine.ranks.world_size
    told = f"out of memory on {run.engine.ranks.device}" + (
        f" when {_size(asked)} more were asked for" if asked else ""
    )
    if before is not None:
        told += f"; {before.name} has {_size(before.total)}, {_size(before.free)} of it free before the first step"
    told += f"; the batch is {share} images a rank"
    told += f" in {engine.accumulation} micro-batches" if engine.accumulation > 1 else ""
    ways = "choose a smaller batch_size, or keep it and its loss with a larger engine.accumulation"
    if before is not None:
        with contextlib.suppress(Exception):  # a method that cannot be run without values: it is only not counted
            ways = _ways(run, share, step_need(run), before)
    if run.engine.ranks.device.type == "cpu" and engine.keep_memory:
        ways += "; engine.keep_memory=false takes less, and more time"
    return f"{told}. {ways[0].upper()}{ways[1:]}; python -m tools.tune RECIPE --batch-size measures what fits"


def _ways(run: Run, share: int, need: Need, room: Room) -> str:
    ranks, accumulation = run.engine.ranks.world_size, run.engine.config.accumulation
    kind = run.engine.ranks.device.type
    kept = kind == "cpu" and run.engine.config.keep_memory
    budget = room.free * (1 - (_MARGIN_KEPT if kept else _MARGIN[kind])) - _LIBRARIES[kind]
    fits = largest_share(need, budget, share, accumulation)
    if fits == share:
        return "by the size of its tensors this batch should fit: something else took memory, or a smaller one is safer"
    if not fits:
        return f"by the size of the tensors not even {accumulation} images fit: a smaller model or views.size would"
    told = f"by the size of its tensors batch_size={fits * ranks} would fit: set it"
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


def step_need(run: Run) -> Need:
    """By the sizes of all tensors of a forward and backward pass of 8 and 16 images, which are not computed."""
    loader: Any = run.loader
    pixels = len(loader.plan) * 3 * loader.size**2
    parameters = [p for p in run.method.parameters() if p.requires_grad]
    training = run.method.training
    run.method.eval()  # BatchNorm in train mode would wait for the other ranks
    try:
        small, large = (_peak(run, parameters, images) for images in (8, 16))
    finally:
        run.method.train(training)
    per_image = (large - small) / 8
    weights = sum(p.numel() * p.element_size() for p in parameters)
    state = 2 if isinstance(run.engine.optimizer, torch.optim.Adam) else 1
    ahead = 1 if isinstance(loader, ResidentLoader) else loader.config.ahead + 2  # batches of bytes
    return Need(max(0.0, small - per_image * 8) + weights * state, per_image, pixels * (4 + ahead))


def _peak(run: Run, parameters: list[torch.nn.Parameter], images: int) -> int:
    """The most bytes that the tensors of a pass hold at a time."""
    loader: Any = run.loader
    method, device, precision = run.method, run.engine.ranks.device, run.engine.config.precision
    bfloat16 = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True), _Counted() as counted:
        views = torch.empty(len(loader.plan), images, 3, loader.size, loader.size, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            embedded = method.embed(views.chunk(method.view_parts)[0])
            total = torch.stack([v.float().mean() for v in embedded.values() if v.requires_grad]).sum()
        torch.autograd.grad(total, parameters, allow_unused=True)
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


def room_now(device: torch.device) -> Room:
    """What is free for this process, with what its allocator keeps."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Room(torch.cuda.get_device_name(device), total, free + kept)
    memory = psutil.virtual_memory()
    rooms = [Room("the machine", memory.total, memory.available // ranks_of_this_machine())]
    used = psutil.Process().memory_info()
    for kind, flag, taken in ((resource.RLIMIT_AS, "-v", used.vms), (resource.RLIMIT_DATA, "-d", used.data)):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            rooms.append(Room(f"the process (ulimit {flag})", limit, limit - taken))
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
