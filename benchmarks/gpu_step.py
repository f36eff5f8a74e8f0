"""SimCLR's step of the parts that `train.py` builds, and nothing else: no engine, no guard, no log, no data loading."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_cases import MEAN, STD
from kernels.photometric import photometric
from pipelines.batch import ViewBatch
from pipelines.views import PLANS, draw_plan_photometric
from trainers.encoders import Architecture, EncoderConfig, build_encoder
from trainers.methods import Facts
from trainers.methods.simclr import Config, Method
from trainers.optim import OptimConfig, build_optimizer

COUNTED_VIEWS = 4  # FLOPs are counted on so many and scaled: those of convolutions and products are linear in them
WINDOWS = 5
Call = Callable[[], Any]
Loss = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Shape:
    """Of one step: an encoder and two views a side of ``size`` pixels of each of so many images."""

    arch: Architecture
    size: int
    images: int

    @property
    def name(self) -> str:
        return f"{self.arch}, {self.images} images, 2 views of {self.size} x {self.size}"

    @property
    def views(self) -> int:
        return 2 * self.images


class BareStep:
    """uint8 crops -> photometry -> one channels_last forward of both views -> heads -> NT-Xent -> backward -> LARS.

    Crops and weights lie on the device; the photometry's parameters, drawn once, on the CPU, as in a run. Bfloat16
    autocast around encoder and heads. The learning rate is 0: the same work, and weights that never run away.

    Args:
        compiled: torch.compile's backend for encoder and heads, each by itself: the encoder is timed alone as well.
            None: eager.
        loss: of the embeddings, in place of the method's, which also computes the scalars of the log.
    """

    def __init__(
        self, shape: Shape, device: torch.device, *, compiled: str | None = None, loss: Loss | None = None
    ) -> None:
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        self.own_loss = loss
        self.method, self.optimizer = build_method_and_optimizer(shape, device)
        self.method.to(memory_format=torch.channels_last)
        self.flops, self.encoder_flops = self._count()
        if compiled is not None:
            torch.compiler.reset()  # else a second batch size would be compiled for any
            self.method.encoder.compile(backend=compiled, dynamic=False)
            self.method.projector.compile(backend=compiled, dynamic=False)
        plan = PLANS["simclr" if shape.size > 64 else "simclr_cifar"]
        generator = torch.Generator(device).manual_seed(0)
        sides = (2, shape.images, shape.size, shape.size, 3)
        self.crops = torch.randint(0, 256, sides, generator=generator, dtype=torch.uint8, device=device)
        self.indices = torch.arange(shape.images)
        self.draw: Call = lambda: draw_plan_photometric(plan, seed=0, epoch=0, indices=self.indices, size=shape.size)
        self.params = self.draw()
        self.batch = ViewBatch(self.crops[:, :0], self.indices.to(device) % 10, self.indices.to(device))

    def __call__(self) -> None:
        self.train_on(self.views())

    def train_on(self, views: Tensor) -> None:
        self.loss(self.embed(views)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def views(self) -> Tensor:
        """[2, N, 3, S, S] float32, as the loaders make them."""
        backend = "auto" if self.device.type == "cuda" else "reference"  # which needs no numba
        views = photometric(self.crops.flatten(0, 1), self.params, mean=MEAN, std=STD, backend=backend)
        return views.unflatten(0, (2, -1))

    def embed(self, views: Tensor) -> dict[str, Tensor]:
        with self._autocast():
            embeddings: dict[str, Tensor] = self.method(views)
        return embeddings

    def loss(self, embeddings: dict[str, Tensor]) -> Tensor:
        if self.own_loss is not None:
            return self.own_loss(embeddings)
        return self.method.loss(embeddings, self.batch, None)["loss"]

    def encoder(self, views: Tensor) -> Call:
        """The encoder alone, forward and backward, on the same concatenated batch: what bounds a step."""
        weights = [p for p in self.method.encoder.parameters() if p.requires_grad]
        rows = views.flatten(0, 1)

        def run() -> None:
            with self._autocast():
                features = self.method.encoder(rows)
            torch.autograd.grad(features, weights, torch.ones_like(features))

        return run

    def parts(self) -> dict[str, Call]:
        """What a step is made of, each alone on what the part before it gave."""
        views = self.views()
        # With gradients, though they are not wanted: without, what is compiled would be compiled once more.
        embeddings = {name: value.detach() for name, value in self.embed(views).items()}
        features = embeddings["features"].flatten(0, 1).requires_grad_()
        z = embeddings["z"].requires_grad_()
        weights = list(self.method.projector.parameters())

        def heads() -> None:
            with self._autocast():
                rows = self.method.projector(features)
            torch.autograd.grad(rows, [*weights, features], torch.ones_like(rows))

        return {
            "photometry": self.views,
            "encoder": self.encoder(views),
            "heads": heads,
            "loss": lambda: torch.autograd.grad(self.loss(embeddings | {"z": z}), z),
            "optimizer": self._update(views),
        }

    def _update(self, views: Tensor) -> Call:
        """The optimizer's step by gradients that are kept."""
        self.loss(self.embed(views)).backward()
        trained = list(self.method.parameters())
        gradients = [p.grad for p in trained]

        def run() -> None:
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        self.optimizer.zero_grad(set_to_none=True)
        return run

    def to_device(self) -> None:
        """Take the photometry's parameters there too: a CUDA graph cannot copy them from the host's memory."""
        self.params = self.params.to(self.device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    def _count(self) -> tuple[float, float]:
        """FLOPs of a step and of the encoder in it, forward and backward.

        As PyTorch counts convolutions and products, and 6 (2N)² D for the loss, whose kernels it does not see.
        """
        found = []
        views = torch.rand(COUNTED_VIEWS, 3, self.shape.size, self.shape.size, device=self.device)
        for module in (self.method.encoder, nn.Sequential(self.method.encoder, self.method.projector)):
            with FlopCounterMode(display=False) as counter, self._autocast():
                out = module(views)
                out.sum().backward()
            found.append(counter.get_total_flops() * self.shape.views / COUNTED_VIEWS)
            module.zero_grad(set_to_none=True)
        return found[1] + 6 * self.shape.views**2 * out.shape[1], found[0]


def build_method_and_optimizer(shape: Shape, device: torch.device) -> tuple[Method, torch.optim.Optimizer]:
    """SimCLR with its default heads, and LARS with a learning rate of 0."""
    facts = Facts(
        image_size=shape.size,
        mean=MEAN,
        std=STD,
        images=shape.images,
        classes=10,
        multi_label=False,
        seed=0,
        batch_size=shape.images,
        steps_per_epoch=1,
        total_steps=1,
        plan=(),
        steady=False,
    )
    method = Method(Config(), build_encoder(EncoderConfig(arch=shape.arch), shape.size), facts).to(device)
    return method, build_optimizer(OptimConfig(), method, 0.0)


def plain_loss(temperature: float = 0.1) -> Loss:
    """NT-Xent as one writes it down, the whole matrix of similarities in memory."""

    def loss(embeddings: dict[str, Tensor]) -> Tensor:
        z = F.normalize(embeddings["z"].flatten(0, 1).float(), dim=1)
        with torch.autocast(z.device.type, torch.bfloat16):
            logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
            return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z) // 2))

    return loss


def captured(step: Call) -> Call:
    """One CUDA graph of a step, to be replayed; its gradients must be None between two calls.

    Warmed up on a side stream and captured as PyTorch's notes on CUDA graphs have it for a whole network.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            step()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own in place
    return graph.replay


def in_turns(calls: Mapping[str, Call], device: torch.device, seconds: float) -> dict[str, float]:
    """Median milliseconds of a call of each, after two that do not count.

    The device is waited for at the ends of a window of many calls only, as in a run. Windows of the contenders take
    turns, so that all see the same clock rates; all of them together take about ``seconds``, or a call each if it is 0.
    """
    windows = WINDOWS if seconds else 1
    for call in calls.values():
        call()
    each = seconds / windows / len(calls)
    counts = {name: max(1, min(200, round(each / _window(call, 1, device)))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(windows):
        for name, call in calls.items():
            times[name].append(1000 * _window(call, counts[name], device) / counts[name])
    return {name: statistics.median(spent) for name, spent in times.items()}


def _window(call: Call, count: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait(device)
    return max(time.perf_counter() - start, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def memory(device: torch.device) -> Iterator[dict[str, float | None]]:
    """Gigabytes that were allocated at the peak of the block, and before it; None on a CPU."""
    found: dict[str, float | None] = {"peak_gb": None, "resident_gb": None}
    if device.type != "cuda":
        yield found
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found["resident_gb"] = torch.cuda.memory_allocated() / 1e9
    yield found
    torch.cuda.synchronize()
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
