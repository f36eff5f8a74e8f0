"""The CPU mode: ours and the plain loop train in turns, an epoch each, until each has made its epochs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from benchmarks.speedrun.clock import Clock, reached

Scores = Callable[[nn.Module], dict[str, float]]
KINDS = ("knn", "linear")


class Contender(Protocol):
    @property
    def done(self) -> bool: ...
    @property
    def encoder(self) -> nn.Module: ...
    def epoch(self) -> float: ...


@dataclass
class Runner:
    """A contender, its clocks (of the wall, of all cores) and its curve."""

    contender: Contender
    clock: Clock
    cpu_clock: Clock
    curve: list[dict[str, float]] = field(default_factory=list)
    kept: list[nn.Module] = field(default_factory=list)  # the encoder of each check

    def turn(self, scores: Scores) -> None:
        with self.clock.running(), self.cpu_clock.running():
            loss = self.contender.epoch()
        seconds = {"seconds": self.clock.seconds, "cpu_seconds": self.cpu_clock.seconds}
        self.curve.append({"epoch": len(self.curve) + 1, **seconds, "loss": loss, **scores(self.contender.encoder)})
        self.kept.append(copy.deepcopy(self.contender.encoder))


def take_turns(
    runners: Mapping[str, Runner],
    scores: Scores,
    report: Callable[[str, dict[str, float]], None],
    over: Callable[[], bool],
) -> None:
    """Whose clock shows least goes next, so that all are measured on the same machine for as long as they run; each
    makes one epoch at least, and none begins another once it is `over`."""
    while left := {n: r for n, r in runners.items() if not (r.contender.done or (r.curve and over()))}:
        name = min(left, key=lambda name: left[name].clock.seconds)
        left[name].turn(scores)
        report(name, left[name].curve[-1])


def at_equal_accuracy(ours: Runner, plain: Runner, kind: str) -> dict[str, Any]:
    """Where each was first as good as the plain loop was in the end, by the held-out images; ratios are plain / ours.

    Returns:
        score, target, of both the check that reached it ("ours" is None if none did), the ratios of the seconds.
    """
    score = f"held_{kind}"
    target = plain.curve[-1][score]
    there, mine = reached(plain.curve, score, target), reached(ours.curve, score, target)
    result: dict[str, Any] = {"score": kind, "target": target, "ours": mine, "plain": there}
    for clock in ("seconds", "cpu_seconds"):
        result[f"ratio_{clock}"] = there[clock] / mine[clock] if there and mine else None
    return result


def encoder_at(runner: Runner, check: dict[str, float]) -> nn.Module:
    return runner.kept[int(check["epoch"]) - 1]
