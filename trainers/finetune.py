"""Fine-tuning: an encoder and a linear classifier on it, trained together on labelled images.

Each epoch every labelled image is seen once, as one augmented view. The held-out part is scored after each epoch, and
the weights of its best epoch are what a fit gives. SimCLR's recipe (arXiv:2002.05709, appendix B.5) is the default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipelines.config import LoaderConfig, Section
from pipelines.labelled import LabelledViews
from pipelines.plain_views import plain_batches
from pipelines.sources import Source
from trainers.encoders import feature_width
from trainers.optim import LARS, ScheduleConfig, build_schedule, parameter_groups
from trainers.scores import as_png

EVALUATION_BATCH = 256


class FinetuneConfig(Section):
    """How a network is fitted, whatever it starts from."""

    epochs: int | None = Field(None, ge=1)  # None: `default_epochs`
    batch_size: int | None = Field(None, ge=2)  # at most, an epoch is cut into equal ones; None: `default_batch_size`
    optimizer: Literal["sgd", "adam", "lars"] = "sgd"  # sgd: with Nesterov momentum
    momentum: float | None = Field(None, gt=0, lt=1)  # sgd, lars: 0.9
    weight_decay: float = Field(0.0, ge=0)  # never on biases and norms
    schedule: Literal["cosine", "constant"] = "cosine"
    patience: int = Field(0, ge=0)  # epochs without improvement on the held-out part before a fit ends; 0: never
    head: Literal["zeros", "normal"] = "zeros"  # the classifier's weights at first; normal: deviation 0.01
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on GPUs, float32 on CPUs

    @model_validator(mode="after")
    def _only_what_is_used(self) -> Self:
        if self.optimizer == "adam" and self.momentum is not None:
            raise ValueError("momentum is not used by adam; remove it, or choose sgd or lars")
        return self


class Classifier(nn.Module):
    """An encoder and a linear layer on its features: [N, 3, H, W] -> logits [N, C]."""

    def __init__(self, encoder: nn.Module, classes: int, head: Literal["zeros", "normal"] = "zeros") -> None:
        """``encoder`` is used as it is, and trained: give a copy of one that is to stay."""
        super().__init__()
        self.encoder = encoder.requires_grad_(True)
        self.head = nn.Linear(feature_width(encoder), classes)
        nn.init.zeros_(self.head.bias)
        if head == "zeros":
            nn.init.zeros_(self.head.weight)
        else:
            nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(images))
        return logits


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A score on the held-out part."""

    top1: float  # percent
    loss: float  # mean cross-entropy

    def better_than(self, other: HeldOut) -> bool:
        """By accuracy; among equals, of which small held-out parts have many, by the loss."""
        return (self.top1, -self.loss) > (other.top1, -other.loss)


@dataclass(slots=True)
class Fit:
    """A fitted network: the weights of the best epoch on the held-out part, or of the last epoch without one."""

    state: dict[str, Tensor]
    epoch: int  # whose weights these are, from 1
    held_out: HeldOut | None
    history: list[dict[str, float]]  # of each epoch: its loss, and what the held-out part got

    def better_than(self, other: Fit | None) -> bool:
        """Without a held-out part none is."""
        return other is None or (
            self.held_out is not None and other.held_out is not None and self.held_out.better_than(other.held_out)
        )


def default_batch_size(images: int) -> int:
    """256, or less where that would be fewer than four steps an epoch, down to 32."""
    return min(256, max(32, images // 4))


def default_epochs(share: float, steps_per_epoch: int) -> int:
    """Epochs for a share of the training images with labels: SimCLR's, or as many as make 200 steps.

    SimCLR takes 60 epochs with 1 % of ImageNet's labels, and 30 with 10 % (and SimCLRv2, arXiv:2006.10029, 30 with
    all). They are thousands of steps there; where a hundred images carry labels, 30 epochs are 30 steps.
    """
    return max(60 if share <= 0.03 else 30, -(-200 // steps_per_epoch))


def build_finetune_optimizer(
    config: FinetuneConfig, model: Classifier, *, lr_body: float, lr_head: float
) -> torch.optim.Optimizer:
    """Over all parameters of both parts, each part with its own learning rate (kept as ``peak`` in its groups).

    LARS adapts the body alone, as SimCLR's code does: a classifier of zeros has no scale to adapt to.
    """
    groups = []
    for part, lr in ((model.encoder, lr_body), (model.head, lr_head)):
        for group in parameter_groups(part, config.weight_decay):
            groups.append({**group, "lr": lr, "peak": lr, "adapt": group["adapt"] and part is not model.head})
    momentum = 0.9 if config.momentum is None else config.momentum
    if config.optimizer == "lars":
        return LARS(groups, lr_body, momentum=momentum)
    for group in groups:
        del group["adapt"]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr_body, momentum=momentum, nesterov=True)
    return torch.optim.Adam(groups, lr_body)


def fit(
    model: Classifier,
    views: LabelledViews,
    config: FinetuneConfig,
    *,
    lr_head: float,
    lr_body: float,
    epochs: int,
    validate: Callable[[nn.Module], HeldOut] | None = None,
    report: Callable[[dict[str, float]], None] = lambda row: None,
) -> Fit | None:
    """Train ``model`` in place, on the device of the views.

    Args:
        validate: scores the model on the held-out part, after each epoch; None: the last epoch's weights are kept.
        report: called after each epoch with its row of the history.

    Returns:
        What to keep; None where training diverged before there was anything.
    """
    model.to(views.device).to(memory_format=torch.channels_last)
    optimizer = build_finetune_optimizer(config, model, lr_head=lr_head, lr_body=lr_body)
    schedule = ScheduleConfig(name=config.schedule, warmup_epochs=0)
    factor = build_schedule(schedule, 1.0, views.steps_per_epoch, epochs * views.steps_per_epoch)
    best: Fit | None = None
    history: list[dict[str, float]] = []
    for epoch in range(epochs):
        row: dict[str, float] = {"epoch": epoch + 1}
        row["loss"] = _train_epoch(model, views, optimizer, epoch, factor, low=low_precision(config, views.device))
        held_out = None if validate is None else validate(model)
        if held_out is not None:
            row |= {"held_out_top1": held_out.top1, "held_out_loss": held_out.loss}
        if not all(map(math.isfinite, row.values())):
            return best if validate is not None else None
        history.append(row)
        report(row)
        if best is None or best.held_out is None or held_out is None or held_out.better_than(best.held_out):
            state = {name: value.clone() for name, value in model.state_dict().items()}
            best = Fit(state, epoch + 1, held_out, history)
        if config.patience and epoch + 1 - best.epoch >= config.patience:
            break
    return best


def _train_epoch(
    model: Classifier,
    views: LabelledViews,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    factor: Callable[[int], float],
    *,
    low: bool,
) -> float:
    """One pass over the labelled images; returns their mean loss."""
    model.train()
    total = torch.zeros((), device=views.device)
    for step, batch in enumerate(views.epoch(epoch), start=epoch * views.steps_per_epoch):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor(step)
        with torch.autocast(views.device.type, torch.bfloat16, enabled=low):
            logits = model(batch.views[0])
        loss = F.cross_entropy(logits.float(), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(batch.labels)
    return total.item() / views.images


def low_precision(config: FinetuneConfig, device: torch.device) -> bool:
    """Whether the forward pass of training is in bfloat16."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")


@torch.no_grad()
def predict(
    model: nn.Module, source: Source, size: int, device: torch.device, loading: LoaderConfig | None = None
) -> Tensor:
    """Logits [N, C] float32 of all images of a source in its order, in evaluation mode."""
    model.eval()
    batches = plain_batches(source, size, EVALUATION_BATCH, device, loading)
    return torch.cat([model(images).float() for images, _ in batches])


def held_out_score(
    source: Source, size: int, device: torch.device, loading: LoaderConfig | None = None
) -> Callable[[nn.Module], HeldOut]:
    """Scores a model on a source."""
    labels = source.labels.to(device)

    def score(model: nn.Module) -> HeldOut:
        logits = predict(model, source, size, device, loading)
        top1 = 100 * (logits.argmax(1) == labels).double().mean().item()
        return HeldOut(top1, F.cross_entropy(logits, labels).item())

    return score


def curves_picture(histories: dict[str, list[list[dict[str, float]]]], title: str) -> bytes:
    """A PNG of training loss and held-out accuracy by epoch: for each start, the history of each of its runs."""
    from matplotlib.figure import Figure

    panels = {"loss": "training loss"}
    if any("held_out_top1" in row for runs in histories.values() for history in runs for row in history):
        panels["held_out_top1"] = "held-out top-1 (%)"
    figure = Figure(figsize=(4.8 * len(panels), 3.8), layout="constrained")
    for axes, (key, name) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (start, runs) in enumerate(histories.items()):
            for label, history in zip([start, *[None] * len(runs)], runs, strict=False):
                epochs = [row["epoch"] for row in history]
                style = {"color": f"C{number}", "alpha": 0.7, "marker": "." if len(epochs) < 30 else ""}
                axes.plot(epochs, [row[key] for row in history], label=label, **style)
        axes.set(xlabel="epoch", ylabel=name)
        axes.locator_params("x", integer=True)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(title)
    return as_png(figure)
