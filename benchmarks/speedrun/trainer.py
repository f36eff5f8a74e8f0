"""Training from images that lie on the device: one function makes the whole step, and a CUDA graph can hold it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.speedrun.clock import Clock
from benchmarks.speedrun.data import Data
from benchmarks.speedrun.network import Network, batch_loss
from benchmarks.speedrun.recipe import Recipe
from benchmarks.speedrun.update import Average, Update, average_weight
from benchmarks.speedrun.views import draw_boxes, draw_colours
from kernels.crop import crop_resize
from kernels.photometric import photometric

_WARM_UP = 3  # steps on a side stream before a capture
_TIMED = 5  # steps


class Trainer:
    """A network and all that changes with it.

    What a step reads from outside (rows of the batch, learning rate, weight of the average) lies in tensors that are
    filled in place, and what it leaves behind is changed in place: so the same graphs serve all steps and all seeds.

    Raises:
        ValueError: the batch is larger than the training part.
    """

    def __init__(self, data: Data, recipe: Recipe, device: torch.device, seed: int = 0) -> None:
        if recipe.batch > len(data.train):
            raise ValueError(f"a batch of {recipe.batch} needs as many training images, there are {len(data.train)}")
        self.data, self.recipe, self.device = data, recipe, device
        self.per_epoch = len(data.train) // recipe.batch
        self.epochs, self.step = recipe.epochs, 0
        self.network = _laid_out(Network(recipe), recipe, device)
        self.averaged = copy.deepcopy(self.network) if recipe.average else self.network
        self.rows = torch.zeros(recipe.batch, dtype=torch.int64, device=device)
        self.lr, self.weight, self.loss_sum = (torch.zeros((), device=device) for _ in range(3))
        self.canvas = torch.full((2 * recipe.batch, 2), data.side, dtype=torch.int64, device=device)
        self.update = Update(self.network, recipe, self.lr)
        self.average = Average(self.network, self.averaged, self.weight) if recipe.average else None
        self.forward: Callable[[Tensor], Tensor] = self.network
        if recipe.compile and device.type == "cuda":
            self.forward = torch.compile(self.network, dynamic=False)
        self.made: dict[int, Callable[[], Any]] = {side: self._eager(side) for _, side in recipe.sizes}
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Back to step 0, with weights and random numbers of `seed`."""
        torch.manual_seed(seed)
        fresh = Network(self.recipe).state_dict()
        for module in {id(m): m for m in (self.network, self.averaged)}.values():
            module.load_state_dict(fresh)
        for velocity in self.update.velocities:
            velocity.zero_()
        self.step = 0
        self.loss_sum.zero_()

    def prepare(self) -> None:
        """Compile, tune and capture the step of every size; the weights are drawn anew by `reset`."""
        graph = self.recipe.graph and self.device.type == "cuda"
        for _, side in self.recipe.sizes:
            step = self._eager(side)
            self.made[side] = _captured(step) if graph else step
            if not graph:
                step()

    def epoch(self) -> float:
        """One pass over the training part; the mean loss."""
        order = torch.randperm(len(self.data.train), device=self.device)
        self.loss_sum.zero_()
        for rows in order.split(self.recipe.batch)[: self.per_epoch]:
            self.rows.copy_(rows)
            self.lr.fill_(self.recipe.lr_at(self.step, self.steps))
            self.weight.fill_(average_weight(self.step, self.steps, self.recipe.average))
            self.made[self.recipe.size_at(self.step / self.steps)]()
            self.step += 1
        return self.loss_sum.item() / self.per_epoch

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.epochs * self.per_epoch

    def seconds_of_an_epoch(self, clock: Clock) -> float:
        """About, at the sizes' shares of the run; leaves weights behind that `reset` has to draw anew."""
        starts = [start for start, _ in self.recipe.sizes] + [1.0]
        total = 0.0
        for (start, side), end in zip(self.recipe.sizes, starts[1:], strict=True):
            before = clock.seconds
            with clock.running():
                for _ in range(_TIMED):
                    self.made[side]()
            total += (end - start) * (clock.seconds - before) / _TIMED * self.per_epoch
        return total

    @property
    def done(self) -> bool:
        return self.step >= self.steps

    @property
    def encoder(self) -> nn.Module:
        """What is evaluated: with averaged weights, if the recipe averages."""
        encoder: nn.Module = self.averaged.encoder
        return encoder

    def _eager(self, side: int) -> Callable[[], None]:
        """The whole step at one size, from the rows to the changed weights."""
        parameters = list(self.network.parameters())

        def step() -> None:
            views = self.views(side)
            with self._autocast():
                loss = batch_loss(self.forward(views), self.recipe)
            self.update(torch.autograd.grad(loss, parameters))
            if self.average is not None:
                self.average()
            self.loss_sum.add_(loss.detach())

        return step

    def views(self, side: int) -> Tensor:
        """[2N, 3, side, side]: first all first views of the batch's rows, then all second ones."""
        count, recipe, data = 2 * self.recipe.batch, self.recipe, self.data
        boxes = draw_boxes(count, data.side, recipe.crop, self.device)
        crops = crop_resize(data.train.images, boxes, side, rows=self.rows.repeat(2), sizes=self.canvas)
        dtype = torch.bfloat16 if self._half else torch.float32
        colours = draw_colours(count, recipe, self.device)
        views = photometric(crops, colours, mean=data.mean, std=data.std, out_dtype=dtype)
        return views if recipe.channels_last else views.contiguous()

    @property
    def _half(self) -> bool:
        return self.recipe.half and self.device.type == "cuda"

    def _autocast(self) -> Any:
        # Casts that are kept from one step to the next would be those of old weights in a graph.
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if self._half else nullcontext()


def _laid_out(network: Network, recipe: Recipe, device: torch.device) -> Network:
    if recipe.channels_last:
        cast(nn.Module, network).to(memory_format=torch.channels_last)  # in place
    return network.to(device)


def _captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph. Random numbers are those of the default generator, which a capture registers."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay
