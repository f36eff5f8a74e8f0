"""Probabilistic SimCLR as a method: its losses from the formulas, its dropout, and its parts on ranks and on resuming.

Posteriors and dropout have their own tests: tests/trainers/test_dropout.py; the loss: tests/kernels/test_simplex.py.
"""

import math
from typing import Any

import pytest
import torch

from tests.trainers.small_runs import (
    check_ranks_and_micro_batches,
    check_resumes,
    facts,
    make_method,
    parameters,
    views_of_step,
)
from trainers.dropout import MCDropout, dropout_rate
from trainers.methods.probsimclr import Config

SMALL: dict[str, Any] = {"projector": {"hidden": 32, "output": 16}}
PAIRS = 5


def projections() -> torch.Tensor:
    return 2 * torch.randn(2, PAIRS, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def posteriors(rows: list[list[float]], beta: float) -> list[list[float]]:
    u = [[math.log1p(math.exp(beta * value)) / beta for value in row] for row in rows]
    return [[value / sum(row) for value in row] for row in u]


@pytest.mark.parametrize(
    ("settings", "temperature", "beta", "floor"),
    [
        ({}, 0.5, 0.8, 1e-4),
        ({"temperature": 1.0, "beta": 2.0}, 1.0, 2.0, 1e-4),
        ({"temperature": 0.3, "floor": 0.9}, 0.3, 0.8, 0.9),
    ],
)
def test_simplex_loss_is_the_formula(settings: dict[str, Any], temperature: float, beta: float, floor: float) -> None:
    z = projections()
    first, second = (posteriors(view, beta) for view in z.tolist())
    r = [[max(PAIRS * sum(p * q for p, q in zip(a, b, strict=True)), floor) for b in second] for a in first]
    powers = [[value ** (1 / temperature) for value in row] for row in r]
    total = 0.0
    for i in range(PAIRS):
        total -= math.log(powers[i][i] / sum(powers[i]))
        total -= math.log(powers[i][i] / sum(row[i] for row in powers))
    found = make_method("probsimclr", SMALL | settings).loss({"z": z}, views_of_step(0, torch.float64), None)
    assert found["loss"].item() == pytest.approx(total / (2 * PAIRS), rel=1e-10)
    both = first + second
    assert found["posterior_confidence"].item() == pytest.approx(sum(map(max, both)) / len(both), rel=1e-10)
    assert "contrastive_accuracy" not in found


def test_ntxent_loss_is_the_formula() -> None:
    z = projections()
    method = make_method("probsimclr", SMALL | {"loss": "ntxent", "temperature": 0.3})
    found = method.loss({"z": z}, views_of_step(0, torch.float64), None)
    unit = z.flatten(0, 1) / z.flatten(0, 1).norm(dim=1, keepdim=True)
    total, hits = 0.0, 0
    for i, row in enumerate((unit @ unit.T / 0.3).tolist()):
        others = {j: value for j, value in enumerate(row) if j != i}
        positive = (i + PAIRS) % (2 * PAIRS)
        total += math.log(sum(map(math.exp, others.values()))) - row[positive]
        hits += max(others, key=others.get) == positive
    assert found["loss"].item() == pytest.approx(total / (2 * PAIRS), rel=1e-10)
    assert found["contrastive_accuracy"].item() == pytest.approx(hits / (2 * PAIRS))
    assert "posterior_entropy" not in found  # a projection that no simplex loss has trained is no posterior


@pytest.mark.parametrize("loss", ["simplex", "ntxent"])
def test_gradient_by_differences(loss: str) -> None:
    method, batch = make_method("probsimclr", SMALL | {"loss": loss}), views_of_step(0, torch.float64)
    z = projections().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: method.loss({"z": z}, batch, None)["loss"], z)
    found = method.loss({"z": z}, batch, None)
    assert all(not value.requires_grad for name, value in found.items() if name != "loss")


def test_dropout_is_in_encoder_and_projector_and_off_in_evaluation() -> None:
    views = views_of_step(0, torch.float64).views
    plain, method = make_method("probsimclr", SMALL), make_method("probsimclr", SMALL | {"dropout": 0.3})
    for part in (method.encoder, method.projector):
        assert dropout_rate(part) == 0.3
    assert not any(isinstance(module, MCDropout) for module in plain.modules())
    assert torch.equal(parameters(plain), parameters(method))  # the same names, in the same order, start alike
    assert plain.state_dict().keys() == method.state_dict().keys()
    assert not torch.equal(method.embed(views)["z"], method.embed(views)["z"])
    assert torch.equal(method.eval().embed(views)["z"], method.embed(views)["z"])


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=1 is too small for method\.name=.*at least 2"):
        Config().check(images=10, batch_size=1, image_size=32)
    with pytest.raises(ValueError, match=r"3 views of an image, method\.name=probsimclr takes 2"):
        Config().check_views(facts(views=3).plan)
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout"):
            Config(dropout=rate)


def test_ranks_and_micro_batches_change_nothing() -> None:
    check_ranks_and_micro_batches("probsimclr", SMALL)


def test_resumes_to_the_bit_with_dropout() -> None:
    check_resumes("probsimclr", SMALL | {"dropout": 0.3})
