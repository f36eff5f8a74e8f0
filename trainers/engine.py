"""DeepSpeed, and everything that has to be known about it: the only file that imports it.

Stage 0 by default: float32 weights and BatchNorm, ``torch_autocast`` for bfloat16, gradients averaged over ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from pipelines.config import Section
from trainers.batchnorm import average_running_statistics, synchronise_batchnorm
from trainers.watch import failures_reported, open_store, watched

T = TypeVar("T")


class EngineConfig(Section):
    # auto: bfloat16 on GPUs, float32 on CPUs; float64: for checks that two ways to compute agree
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    accumulation: int = Field(1, ge=1)  # micro-batches a step and rank; the loss still sees all of them at once
    gradient_clipping: float = Field(0.0, ge=0)  # largest global gradient norm; 0 is off
    zero_stage: Literal[0, 1, 2] = 0
    batchnorm: Literal["sync", "local"] = "sync"  # local: per rank, running statistics averaged before use
    channels_last: bool = True
    compile: bool = False  # torch.compile encoder and heads together
    keep_memory: bool = True  # on CPUs what a step frees is kept for the next: faster, and up to half more memory
    # A step whose loss or weights are NaN or infinite. stop: the run ends, its images are listed in RUN/nonfinite.
    # skip: the step is undone and counted, at the price of a copy of the weights and a wait for the device a step.
    nonfinite: Literal["stop", "skip"] = "stop"
    skips_in_a_row: int = Field(5, ge=1)  # more end the run, with nonfinite=skip
    skips: int = Field(100, ge=1)  # more in all end the run
    timeout: float = Field(60, ge=1, le=86400)  # seconds after which a frozen rank or a silent link ends all ranks
    start_timeout: float = Field(1800, ge=1, le=86400)  # seconds that ranks wait for each other, and for rank 0's work
    watch_port: int = Field(0, ge=0, le=65535)  # where rank 0's companion listens (trainers/watch.py); 0: any free


@dataclass(frozen=True)
class Ranks:
    """Who this process is among all that train together."""

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None  # None when alone
    control: dist.ProcessGroup | None  # gloo, for decisions on the host; None when alone

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank must call it."""
        return bool(self.highest(flag)[0])

    def highest(self, *values: float) -> list[float]:
        """The largest over the ranks of each value; every rank must call it with as many."""
        if self.control is None:
            return list(values)
        largest = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return largest.tolist()

    def to_main(self, value: T) -> list[T]:
        """On rank 0 the values of all ranks, elsewhere nothing; every rank must call it."""
        if self.control is None:
            return [value]
        boxes: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, boxes, dst=0, group=self.control)
        return boxes or []

    def from_main(self, value: T) -> T:
        """Rank 0's value on every rank; every rank must call it."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)


@contextmanager
def joined_ranks(config: EngineConfig, refusals: tuple[type[Exception], ...] = ()) -> Iterator[Ranks]:
    """Join the other processes that torchrun or deepspeed started (their environment says so), or stand alone.

    Several ranks watch over each other until the end of the block: what fails in one is told to all, and an exception
    of a ``refusals`` type as refused input (trainers/watch.py).
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if _has_gpu() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # no port is opened and no environment needed
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            yield Ranks(rank=0, world_size=1, device=device, group=None, control=None)
        finally:
            dist.destroy_process_group()
        return
    patience = timedelta(seconds=config.start_timeout)
    store, rank, world_size = open_store(config.start_timeout)
    watch = watched(
        store,
        rank,
        world_size,
        timeout=config.timeout,
        patience=config.start_timeout,
        port=config.watch_port,
    )
    with watch, failures_reported(refusals):
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
        control = dist.new_group(backend="gloo", timeout=patience)
        yield Ranks(rank, world_size, device, dist.group.WORLD, cast(dist.ProcessGroup, control))
        dist.destroy_process_group()  # after a failure it could wait for a rank that is gone


class Engine:
    """A method and its optimizer under DeepSpeed.

    ``forward`` runs under autocast where the precision asks for it; ``backward`` accumulates and, after the last of
    ``accumulation`` micro-batches (times ``view_parts``, for methods that embed their views in parts), averages over
    ranks; ``step`` counts them and updates after the last.
    """

    def __init__(
        self,
        method: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: EngineConfig,
        ranks: Ranks,
        micro_batch_size: int,
        view_parts: int = 1,
    ) -> None:
        self.config, self.ranks, self.method = config, ranks, method
        deepspeed = _import_deepspeed(ranks, config.start_timeout)
        self._patient_calls = 2 * config.accumulation * view_parts  # two whole steps: all is compiled by then
        precision = config.precision
        if precision == "auto":
            precision = "bfloat16" if ranks.device.type == "cuda" else "float32"
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": config.accumulation * view_parts,
            "train_batch_size": micro_batch_size * config.accumulation * view_parts * ranks.world_size,
            # Without ZeRO we clip: DeepSpeed's own copies two numbers to the device, and waits, in every step.
            "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device at both ends of a step
            "zero_optimization": {"stage": config.zero_stage},
            "zero_allow_untested_optimizer": True,  # SGD is exact under ZeRO; the recipe refuses LARS
            "steps_per_print": 1 << 62,
        }
        if precision == "bfloat16":  # the `bf16` section would cast BatchNorm and its statistics
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        self._engine, *_ = deepspeed.initialize(
            model=method, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self._optimizer = optimizer
        self._trained = [p for p in method.parameters() if p.requires_grad]
        if ranks.world_size == 1 and config.zero_stage == 0:
            # There is no one to average with; DeepSpeed would copy every gradient into one flat tensor and back.
            self._engine.enable_backward_allreduce = False
        if any(p.dtype == torch.float64 for p in method.parameters()):
            self._engine.communication_data_type = torch.float64  # else doubles are averaged in float32
            _let_deepspeed_reduce_doubles()
        if config.channels_last and config.zero_stage == 0:
            # Only now: DeepSpeed's first broadcast views weights as bytes, which permuted strides forbid, and ZeRO
            # keeps them in one flat buffer (there, only activations are channels_last).
            method.to(memory_format=torch.channels_last)

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        return self._engine(views.double() if self.config.precision == "float64" else views)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, which already is this micro-batch's share of the step's loss."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        """To be called after each ``backward``; the update, with this learning rate, follows the last one."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self.config.zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
            self._complete_gradients()
        self._engine.step()
        self._patient_calls -= 1
        if self._patient_calls == 0 and self.ranks.group is not None and not self.config.compile:
            self._expect_ranks_together()

    def _complete_gradients(self) -> None:
        """A parameter that nothing pulls at decays all the same, as on many ranks, where DeepSpeed sees to it."""
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.config.gradient_clipping > 0:
            nn.utils.clip_grad_norm_(self._trained, self.config.gradient_clipping)

    def _expect_ranks_together(self) -> None:
        """From now on a collective of a step that waits longer than ``timeout`` means that a rank is stuck.

        The watch sees a rank that is gone or frozen, and sees it first; this is for one that is alive and waits for
        something else. The control group stays patient: there ranks wait for rank 0 to write a checkpoint.
        """
        from deepspeed.utils import groups

        for group in (self.ranks.group, groups._WORLD_GROUP):
            set_group_timeout(group, 1.25 * self.config.timeout + 5)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that it was made with."""
        return self._optimizer

    @property
    def overflowed(self) -> bool:
        """Whether the last update was left out, without an error: what ZeRO does where a gradient is not finite."""
        return bool(getattr(self._engine.optimizer, "overflow", False))

    def average_running_statistics(self) -> None:
        """With per-rank BatchNorm, make all ranks agree before saving or evaluating."""
        if self.ranks.group is not None and self.config.batchnorm == "local":
            average_running_statistics(self.method, self.ranks.group)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Every tensor of the optimizer's state: by parameter name, or under ZeRO this rank's shard by group."""
        return {
            f"{owner}::{key}": value
            for owner, parameter in self._owners().items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``optimizer_state``.

        Raises:
            ValueError: the state lacks a parameter of this run, or holds another's or one of another shape.
        """
        if self.config.zero_stage > 0:
            self._engine.optimizer.refresh_fp32_params()  # ZeRO's own copy of the weights just loaded
        owners = self._owners()
        found = {name.rpartition("::")[0] for name in state}
        if found != owners.keys():
            raise ValueError(f"the optimizer's state and the parameters differ in {sorted(found ^ owners.keys())[:5]}")
        for name, value in state.items():
            owner, _, key = name.rpartition("::")
            parameter = owners[owner]
            if value.shape == parameter.shape:  # in the parameter's own memory format
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            elif value.dim():
                raise ValueError(f"optimizer state {name} is {list(value.shape)}, not {list(parameter.shape)}")
            elif self._optimizer.defaults.get("fused"):  # Adam's step count, which else stays on the host
                value = value.to(parameter.device)
            self._optimizer.state[parameter][key] = value

    def load_optimizer_shards(self, shards: list[dict[str, Tensor]]) -> None:
        """As ``load_optimizer_state``, under ZeRO, from the shards of another number of ranks, in their order.

        Raises:
            ValueError: they are of other parameters.
        """
        sizes = [sum(p.numel() for p in group) for group in self._engine.optimizer.bit16_groups]
        owners = dict(zip(self._owners(), sizes, strict=True))
        own: dict[str, Tensor] = {}
        for name in shards[0]:
            parts = [shard[name] for shard in shards]
            owner = name.rpartition("::")[0]
            if parts[0].dim() and owner in owners:
                own[name] = recut(parts, owners[owner], self._owners()[owner].numel(), self.ranks.rank)
            else:  # a step count, the same on all; or another's, which is refused below
                own[name] = parts[0]
        self.load_optimizer_state(own)

    @torch.no_grad()
    def restore_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Put back in place what ``optimizer_state`` gave before a step; what the step added is forgotten.

        The weights are put back first: ZeRO keeps a copy of its own.
        """
        if self.config.zero_stage > 0:
            self._engine.optimizer.refresh_fp32_params()
        for owner, parameter in self._owners().items():
            own = self._optimizer.state.get(parameter, {})
            for key in [key for key, value in own.items() if isinstance(value, Tensor)]:
                if f"{owner}::{key}" in state:
                    own[key].copy_(state[f"{owner}::{key}"])
                else:
                    del own[key]

    def _owners(self) -> dict[str, Tensor]:
        if self.config.zero_stage == 0:
            return dict(self.method.named_parameters())
        return {f"group{i}": flat for i, flat in enumerate(self._engine.optimizer.single_partition_of_fp32_groups)}


def recut(parts: list[Tensor], size: int, share: int, rank: int) -> Tensor:
    """This rank's ``share`` of the flat tensor of ``size`` values that was cut into ``parts``.

    DeepSpeed pads with zeros at the end, up to a multiple of twice the number of ranks, and cuts evenly.

    Raises:
        ValueError: the parts are too few values, or more than padding explains.
    """
    whole = torch.cat(parts)
    if not 0 <= whole.numel() - size < 2 * len(parts):
        raise ValueError(f"the optimizer's shards hold {whole.numel()} values, the parameters are {size}")
    mine = torch.zeros(share, dtype=whole.dtype)
    start = rank * share
    values = whole[:size][start : start + share]
    mine[: values.numel()] = values
    return mine


def set_group_timeout(group: dist.ProcessGroup | None, seconds: float) -> None:
    """Change how long collectives of a group (None: the default group) may take, from the next one on."""
    set_timeout = getattr(dist, "set_timeout", None)  # public since torch 2.12 or so
    if set_timeout is None:
        set_timeout = dist.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=seconds), group)


Module = TypeVar("Module", bound=nn.Module)


def prepare_module(module: Module, config: EngineConfig, ranks: Ranks) -> Module:
    """Move to the device and precision, and synchronise BatchNorm: before the optimizer sees the parameters."""
    if ranks.group is not None and config.batchnorm == "sync":
        synchronise_batchnorm(module, ranks.group)
    return module.to(ranks.device, torch.float64 if config.precision == "float64" else None)


def _has_gpu() -> bool:
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def _let_deepspeed_reduce_doubles() -> None:
    """Its list of what can be reduced leaves float64 out."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if torch.float64 not in accelerator.supported_dtypes():
        dtypes = [*accelerator.supported_dtypes(), torch.float64]
        accelerator.supported_dtypes = lambda: dtypes


def _import_deepspeed(ranks: Ranks, timeout: float) -> Any:
    if ranks.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read at import
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, alone as well
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import groups, logger

    logger.setLevel(logging.WARNING)
    # Its shared-memory all-reduce for CPUs is compiled at start-up: 94 s, and a crash without ninja. Gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    # DeepSpeed reduces gradients over a clone of the world group, made with PyTorch's default timeout of
    # 10 to 30 minutes whatever init_process_group was told; a frozen peer would hang all others for as long.
    groups._WORLD_GROUP = dist.new_group(timeout=timedelta(seconds=timeout))
    return deepspeed
