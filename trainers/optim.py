"""Optimizers, parameter groups by module type, and learning-rate schedules in optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipelines.config import Section

Share = Annotated[float, Field(ge=0, lt=1)]
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)
_USES = {
    "lars": {"momentum", "trust_coefficient"},
    "sgd": {"momentum", "nesterov"},
    "adam": {"betas"},
    "adamw": {"betas"},
}


class OptimConfig(Section):
    """What turns gradients into steps. Fields left at ``None`` take the value in the comment."""

    name: Literal["lars", "sgd", "adam", "adamw"] = "lars"
    lr: float = Field(0.3, gt=0)  # for a batch of 256 images where a scaling rule is on
    lr_scaling: Literal["none", "linear", "sqrt"] = "linear"  # × batch/256, × √(batch/256)
    weight_decay: float = Field(1e-6, ge=0)  # never on biases and norms
    momentum: float | None = Field(None, ge=0, lt=1)  # lars, sgd: 0.9
    nesterov: bool | None = None  # sgd: false
    betas: tuple[Share, Share] | None = None  # adam, adamw: 0.9, 0.999
    trust_coefficient: float | None = Field(None, gt=0)  # lars: 0.001

    @model_validator(mode="after")
    def _only_what_is_used(self) -> OptimConfig:
        for field in ("momentum", "nesterov", "betas", "trust_coefficient"):
            if getattr(self, field) is not None and field not in _USES[self.name]:
                users = " or ".join(sorted(name for name, uses in _USES.items() if field in uses))
                raise ValueError(f"{field} is not used by {self.name}; remove it, or choose {users}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def scaled_lr(self, batch_size: int) -> float:
        """The peak learning rate for ``batch_size`` images a step."""
        factor = batch_size / 256
        return self.lr * {"none": 1.0, "linear": factor, "sqrt": math.sqrt(factor)}[self.lr_scaling]


class ScheduleConfig(Section):
    name: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: float = Field(10, ge=0)  # linear, from lr/warm-up steps up to lr
    final: float = Field(0.0, ge=0, le=1)  # cosine: where it ends, as a share of the peak
    milestones: tuple[Share, ...] = (0.6, 0.8)  # step: shares of the whole run after which lr × gamma
    gamma: float = Field(0.1, gt=0, le=1)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights with decay (and layer-wise adaptation), and biases and norm parameters without.

    Membership goes by the module's type, never by a substring of its name: "bn" would miss the normalisation
    inside shortcuts and projectors.
    """
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.requires_grad:
                (others if isinstance(child, _NORMS) or name == "bias" else weights).append(parameter)
    groups = [
        {"params": weights, "weight_decay": weight_decay, "adapt": True},
        {"params": others, "weight_decay": 0.0, "adapt": False},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(config: OptimConfig, module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer over ``parameter_groups(module)`` with peak learning rate ``lr``."""
    groups = parameter_groups(module, config.weight_decay)
    momentum = 0.9 if config.momentum is None else config.momentum
    if config.name == "lars":
        trust = 0.001 if config.trust_coefficient is None else config.trust_coefficient
        return LARS(groups, lr, momentum=momentum, trust_coefficient=trust)
    for group in groups:
        del group["adapt"]
    # One pass over memory instead of one an operation; not the default, on CPUs nor on GPUs.
    fused = all(p.device.type != "meta" for group in groups for p in group["params"])
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=momentum, nesterov=bool(config.nesterov), fused=fused)
    betas = config.betas or (0.9, 0.999)
    if config.name == "adam":
        return torch.optim.Adam(groups, lr, betas=betas, fused=fused)
    return torch.optim.AdamW(groups, lr, betas=betas, fused=fused)


def build_schedule(
    config: ScheduleConfig, peak: float, steps_per_epoch: int, total_steps: int
) -> Callable[[int], float]:
    """step -> learning rate, a pure function of the optimizer step: nothing to save, nothing to restore."""
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup >= total_steps > 0 and warmup > 0:
        raise ValueError(
            f"schedule.warmup_epochs={config.warmup_epochs:g} is {warmup} steps, but the run has only"
            f" {total_steps}; shorten the warm-up or raise epochs"
        )

    def lr(step: int) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if config.name == "cosine":
            return peak * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress)))
        if config.name == "step":
            passed = sum(step >= share * total_steps for share in config.milestones)
            return peak * config.gamma**passed
        return peak

    return lr


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv:1708.03888), as SimCLR uses it.

    For a tensor w with gradient g: d = g + weight_decay·w; r = trust·|w| / |d|; v = momentum·v + lr·r·d; w = w − v.
    r is 1 where |w| or |d| is zero (a zero-initialised tensor must be able to move, and 0/0 must not spread) and in
    groups with ``adapt=False``. Norms stay on the device: nothing is synchronised.

    Needs whole tensors: under ZeRO the optimizer would see one flat shard a group and compute one ratio for it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        adapt: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        velocities = []
        for p in params:
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p)
            velocities.append(state["momentum_buffer"])
        gradients = [p.grad for p in params if p.grad is not None]
        directions = gradients
        if group["weight_decay"]:
            directions = list(torch._foreach_add(gradients, params, alpha=group["weight_decay"]))
        if group["adapt"]:
            weight_norms = torch.stack(list(torch._foreach_norm(params)))
            norms = torch.stack(list(torch._foreach_norm(directions)))
            usable = (weight_norms > 0) & (norms > 0)
            ratios = torch.where(usable, group["trust_coefficient"] * weight_norms / norms, 1.0)
            if directions is gradients:
                directions = list(torch._foreach_mul(gradients, list(ratios.unbind())))
            else:
                torch._foreach_mul_(directions, list(ratios.unbind()))
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, directions, alpha=group["lr"])
        torch._foreach_sub_(params, velocities)
