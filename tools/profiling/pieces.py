"""The parts of a step, each made callable alone on data that lies on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.batch import ViewBatch
from pipelines.jpeg.decoder import JpegError, jpeg_decoder
from pipelines.loading import cores_of_a_rank, render
from pipelines.sources import ArrayImages, Source
from pipelines.stored.images import decode_bytes
from trainers.methods import BaseMethod
from trainers.nonfinite import NonfiniteGuard
from trainers.pretrain import Run
from trainers.step import StepResult

_DECODED = 64  # images of a decode-only call: a batch of photographs may be thousands


class Pieces:
    """The parts of a run's step on one fixed batch.

    Args:
        run: as ``train.build_run`` makes it; its weights are left as they are, its buffers are not.
        micro_batches: this rank's views of one step.
        dtype: the precision that the engine computes in.
    """

    def __init__(self, run: Run, micro_batches: list[ViewBatch], dtype: torch.dtype) -> None:
        self.run, self.method, self.micro_batches, self.dtype = run, run.method, micro_batches, dtype
        self.ranks = run.engine.ranks
        self.guard = NonfiniteGuard(run.engine, run.method, run.loader, run.directory, run.log)
        self.result: StepResult | None = None
        self._number = 0
        parts = run.method.view_parts
        self._chunks = [views for micro in micro_batches for views in micro.views.chunk(parts)]
        # With engine.compile the method embeds by one graph of encoder and heads; the encoder alone has its own.
        self._own = run.method.encoder
        self._compiled: Any = torch.compile(self._own, dynamic=False) if run.engine.config.compile else None
        self.two_passes = len(micro_batches) > 1 or (parts > 1 and not run.method.separable)

    # ---- of the model ----------------------------------------------------------------------------------

    def encoder(self) -> None:
        """Forward and backward of all views; with two passes one more forward, as the step has it."""
        encoder, weights = self.method.encoder, _trained(self.method.encoder)
        if encoder is self._own and self._compiled is not None:
            encoder = self._compiled
        if self.two_passes:
            with torch.no_grad():
                for views in self._chunks:
                    self._features(encoder, views)
        for views in self._chunks:
            features = self._features(encoder, views)
            torch.autograd.grad(features, weights, torch.ones_like(features), allow_unused=True)

    def heads(self) -> Callable[[], None]:
        """All that ``embed`` does but the encoder, whose place is taken by features that are there already."""
        encoder = self.method.encoder
        weights = self._own_weights()
        with torch.no_grad():
            resident = [_Resident(self._features(encoder, views)) for views in self._chunks]

        def run() -> None:
            for features, views in zip(resident, self._chunks, strict=True):
                if self.two_passes:
                    frozen = _Resident(features.rows, trained=False)
                    with torch.no_grad(), self._encoder_replaced(frozen), self._precision():
                        self.method.embed(views)
                with self._encoder_replaced(features), self._precision():
                    outputs = [t for t in self.method.embed(views).values() if t.requires_grad]
                wanted = [*weights, features.rows]
                torch.autograd.grad(outputs, wanted, [torch.ones_like(t) for t in outputs], allow_unused=True)

        return run

    def targets(self) -> Callable[[], None] | None:
        """What the loss needs of the images besides the embeddings; None where the method needs nothing."""
        if type(self.method).targets is BaseMethod.targets:
            return None

        def run() -> None:
            with torch.no_grad():
                for micro in self.micro_batches:
                    self.method.targets(micro)

        return run

    def loss(self) -> Callable[[], None]:
        """The loss and its gradient on the embeddings."""
        result = self.stepped()
        own = self._own_weights()
        with torch.no_grad():
            targets = self.method.targets(self.micro_batches[0]).keys()
        parts = self.method.view_parts if self.method.separable and not self.two_passes else 1
        chunks = [
            {name: value.chunk(parts)[part] if len(value) % parts == 0 else value for name, value in leaves.items()}
            for part in range(parts)
            for leaves in [result.embeddings]
        ]

        def run() -> None:
            for chunk in chunks:
                leaves = {
                    name: value.detach().requires_grad_(value.is_floating_point() and name not in targets)
                    for name, value in chunk.items()
                }
                loss = self.method.loss(leaves, result.batch, self.ranks.group)["loss"]
                wanted = [*(t for t in leaves.values() if t.requires_grad), *own]
                torch.autograd.grad(loss, wanted, allow_unused=True)

        return run

    def update(self) -> Callable[[], None] | None:
        """What the method does after a step (queue, centres); None where it does nothing."""
        if type(self.method).update is BaseMethod.update:
            return None
        result = self.stepped()

        def run() -> None:
            with torch.no_grad():
                self.method.update(result.embeddings, result.batch, self.ranks.group)

        return run

    def observed(self) -> None:
        """The online probe and the sums of the log, as in every step."""
        result = self.stepped()
        self.run.log.add(result.scalars | self.run.monitor.observe(result), 0.0)

    def communication(self) -> Callable[[], None] | None:
        """One reduction of gradients, and the embeddings of all ranks gathered; None for one rank.

        Synchronised BatchNorm's own two sums a layer are a part of the encoder's time.
        """
        group = self.ranks.group
        if group is None:
            return None
        gradients = torch.zeros(sum(p.numel() for p in _trained(self.method)), device=self.ranks.device)
        own = torch.cat([t.flatten().float() for name, t in self.stepped().embeddings.items() if name != "features"])
        everyone = own.new_empty(own.numel() * self.ranks.world_size)

        def run() -> None:
            dist.all_reduce(gradients, group=group)
            dist.all_gather_into_tensor(everyone, own, group=group)

        return run

    # ---- of the step -----------------------------------------------------------------------------------

    def step(self, micro_batches: list[ViewBatch] | None = None, waited: float = 0.0) -> None:
        """The whole step as ``trainers.pretrain`` makes it, at a learning rate of 0; on the fixed batch by default."""
        self._number += 1
        scalars = self.guard.step(self._number, micro_batches or self.micro_batches, 0.0, self._observed)
        self.run.log.add(scalars, waited)
        self.ranks.highest(0, 0, 0)

    def _observed(self, result: StepResult) -> dict[str, Tensor]:
        self.result = result
        return self.run.monitor.observe(result)

    def stepped(self) -> StepResult:
        """What a step gave."""
        if self.result is None:
            self.step()
        assert self.result is not None
        return self.result

    @contextmanager
    def optimizer_timed(self, optimizer: torch.optim.Optimizer) -> Iterator[list[float]]:
        """A list that, in the end, has the seconds of every update: it is timed inside the engine's step."""
        spent: list[float] = []
        events: list[tuple[Any, Any]] = []
        original = optimizer.step
        cuda = self.ranks.device.type == "cuda"

        def timed(*args: Any, **settings: Any) -> Any:
            if not cuda:
                start = time.perf_counter()
                try:
                    return original(*args, **settings)
                finally:
                    spent.append(time.perf_counter() - start)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                return original(*args, **settings)
            finally:
                end.record()
                events.append((begin, end))

        optimizer.step = timed  # type: ignore[method-assign]
        try:
            yield spent
        finally:
            optimizer.step = original  # type: ignore[method-assign]
            if events:
                torch.cuda.synchronize(self.ranks.device)
                spent += [begin.elapsed_time(end) / 1000 for begin, end in events]

    # ---- of the data -----------------------------------------------------------------------------------

    def photometry(self, seed: int) -> Callable[[], None]:
        """Policies, colours, blur and statistics of crops that lie on the device; their pixels are random."""
        loader: Any = self.run.loader
        indices = torch.cat([micro.indices for micro in self.micro_batches]).cpu()
        views, _, _, side, _ = self.micro_batches[0].views.shape
        crops = torch.randint(0, 256, (views, len(indices), side, side, 3), dtype=torch.uint8, device=self.ranks.device)

        def run() -> None:
            render(loader.source, loader.plan, crops, indices, seed=seed, epoch=0)

        return run

    def read(self) -> tuple[Callable[[], None], int] | None:
        """Stored bytes of images all over the set -> memory, on the loader's threads; with how many a call reads."""
        source = self.run.loader.source
        if isinstance(source.images, ArrayImages) or _module(self.run.loader) == "resident":
            return None
        places = _places(source)
        pool = ThreadPoolExecutor(getattr(self.run.loader, "workers", cores_of_a_rank()))

        def run() -> None:
            for _ in pool.map(source.images.read, [next(places) for _ in range(_DECODED)]):
                pass

        return run, _DECODED

    def decode(self) -> tuple[Callable[[], None], int] | None:
        """Whole decodes from memory on the loader's threads: the bound of a loader that decodes each image once.

        None where pixels are stored or resident, and where DALI decodes by its own means. With how many a call decodes.
        """
        source = self.run.loader.source
        if isinstance(source.images, ArrayImages) or _module(self.run.loader) in ("resident", "dali"):
            return None
        places = _places(source)
        stored = [source.images.read(next(places)) for _ in range(_DECODED)]
        encoded = [data for data in stored if isinstance(data, bytes) or data.ndim == 1]
        if not encoded:
            return None
        pool = ThreadPoolExecutor(getattr(self.run.loader, "workers", cores_of_a_rank()))

        def run() -> None:
            for _ in pool.map(_decoded, encoded):
                pass

        return run, len(encoded)

    # ---- what they work on -----------------------------------------------------------------------------

    def operations(self, call: Callable[[], Any]) -> int:
        """FLOPs of the matrix products and convolutions of a call, as PyTorch counts them; own kernels are not seen."""
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    def _own_weights(self) -> list[Tensor]:
        """The trained tensors of the method that are not the encoder's."""
        named = self.method.named_parameters()
        return [p for name, p in named if p.requires_grad and not name.startswith("encoder.")]

    def _features(self, encoder: nn.Module, views: Tensor) -> Tensor:
        if self.dtype == torch.float64:
            views = views.double()
        with self._precision():
            features: Tensor = encoder(views.flatten(0, 1))
        return features

    def _precision(self) -> Any:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @contextmanager
    def _encoder_replaced(self, other: nn.Module) -> Iterator[None]:
        encoder = self.method.encoder
        self.method.encoder = other
        try:
            yield
        finally:
            self.method.encoder = encoder


class _Resident(nn.Module):
    """Takes the place of an encoder: gives the features that it once gave."""

    def __init__(self, rows: Tensor, trained: bool = True) -> None:
        super().__init__()
        self.rows = rows.detach().requires_grad_(trained)
        self.features = rows.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.rows[: len(images)]


def _module(loader: Any) -> str:
    return type(loader).__module__.rpartition(".")[2]


def _trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def _places(source: Source) -> Iterator[int]:
    """Positions all over the set, each once before any comes again."""
    while True:
        yield from torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()


def _decoded(data: Any) -> None:
    decoder = jpeg_decoder()
    if decoder is not None:
        try:
            decoder.decode(data)
            return
        except JpegError:
            pass  # another format
    decode_bytes(data, "an image of the set")
