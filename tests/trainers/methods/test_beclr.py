"""BeCLR as a method: its loss from the formula, what its switches do, and its parts on ranks and after a resume.

The parts of the loss have their own tests: tests/kernels/test_bregman.py, tests/trainers/parts/test_subnetworks.py.
"""

import math
from typing import Any

import pytest
import torch

from tests.trainers.small_runs import check_ranks_and_micro_batches, check_resumes, facts, make_method, views_of_step
from trainers.methods.beclr import Config, Method

SMALL: dict[str, Any] = {
    "projector": {"hidden": 32, "output": 16},
    "subnetworks": {"count": 6, "widths": [8, 1], "dropout": 0},
}


def at_step(step: int, **settings: Any) -> Method:
    """A method that has done so many of the five steps of a run."""
    method = make_method("beclr", SMALL | settings)
    for _ in range(step):
        method.update({}, None, None)
    return method


def embeddings(pairs: int = 5, width: int = 4, count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "z": torch.randn(2, pairs, width, generator=generator, dtype=torch.float64, requires_grad=True),
        "scores": torch.randn(2, pairs, count, generator=generator, dtype=torch.float64, requires_grad=True),
    }


def softmax_loss(logits: torch.Tensor, pairs: int) -> float:
    """Mean over the anchors of -log softmax at the positive, among all others."""
    total = 0.0
    for i, row in enumerate(logits.tolist()):
        others = [math.exp(value) for j, value in enumerate(row) if j != i]
        total += math.log(sum(others)) - row[(i + pairs) % (2 * pairs)]
    return total / (2 * pairs)


@pytest.mark.parametrize(
    ("settings", "step", "bregman_temperature", "soft"),
    [
        ({}, 0, 0.1, 0.1),
        ({"soft_share": 0.8, "soft_temperatures": [0.4, 0.1]}, 2, 0.1, 0.2),  # half way: the geometric mean
        ({"bregman_temperature": 0.3}, 4, 0.3, None),
        ({"faithful": True, "temperature": 0.4}, 0, 0.4, None),
        ({"faithful": True, "temperature": 0.4, "soft_share": 1.0, "usage_weight": 2.0}, 0, 0.4, 0.1),
        ({"bregman_weight": 3.0, "ntxent_weight": 0.5, "sigma": 0.5, "usage_weight": 0.7}, 4, 0.1, None),
        ({"ntxent_weight": 0.0}, 4, 0.1, None),
    ],
)
def test_loss_is_the_formula(
    settings: dict[str, Any], step: int, bregman_temperature: float, soft: float | None
) -> None:
    given = embeddings()
    z, scores = (given[name].detach().flatten(0, 1) for name in ("z", "scores"))
    weights = torch.nn.functional.one_hot(scores.argmax(1), 6).double() if soft is None else (scores / soft).softmax(1)
    divergence = scores.amax(1, keepdim=True) - scores @ weights.T
    similarity = (-divergence / (2 * settings.get("sigma", 0.9) ** 2)).exp()
    unit = z / z.norm(dim=1, keepdim=True)
    usage = (scores / 0.1).softmax(1).mean(0)
    expected = {
        "bregman_loss": softmax_loss(similarity / bregman_temperature, 5),
        "ntxent_loss": softmax_loss(unit @ unit.T / settings.get("temperature", 0.5), 5),
        "usage_divergence": -(6 * usage).log().mean().item(),
    }
    factors = {
        "bregman_loss": settings.get("bregman_weight", 1.0),
        "ntxent_loss": settings.get("ntxent_weight", 1.0),
        "usage_divergence": settings.get("usage_weight", 0.0 if settings.get("faithful") else 0.1),
    }
    found = at_step(step, **settings).loss(given, views_of_step(0, torch.float64), None)
    assert found["loss"].item() == pytest.approx(sum(factors[name] * expected[name] for name in expected), rel=1e-10)
    for name, value in expected.items():
        assert (name in found) == (factors[name] > 0)
        if name in found:
            assert found[name].item() == pytest.approx(value, rel=1e-10)
    assert all(not value.requires_grad for name, value in found.items() if name != "loss")


@pytest.mark.parametrize(
    "settings", [{}, {"soft_share": 0.0}, {"loss": "margin"}, {"loss": "margin", "faithful": True}]
)
def test_gradient_by_differences(settings: dict[str, Any]) -> None:
    method, given = at_step(0, **settings), embeddings()
    batch = views_of_step(0, torch.float64)

    def loss(z: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return method.loss({"z": z, "scores": scores}, batch, None)["loss"]

    assert torch.autograd.gradcheck(loss, (given["z"], given["scores"]))


def test_the_seed_s_margin_loss_is_half_a_sum() -> None:
    given = embeddings(pairs=24)
    batch = views_of_step(0, torch.float64)
    mean = at_step(2, loss="margin", soft_share=0.0).loss(given, batch, None)["bregman_loss"]
    theirs = at_step(2, loss="margin", faithful=True).loss(given, batch, None)["bregman_loss"]
    assert theirs.item() == pytest.approx(mean.item() * 48 / 2)
    assert at_step(3, loss="margin", soft_share=0.0).loss(given, batch, None)["bregman_loss"] != mean  # drawn anew


def test_hard_winners_follow_soft_ones() -> None:
    temperatures = [at_step(step, soft_share=0.6).soft_temperature for step in range(5)]
    assert temperatures == pytest.approx([0.1, 0.1 * 0.1 ** (1 / 3), 0.1 * 0.1 ** (2 / 3), 0.0, 0.0])
    assert at_step(0, faithful=True).soft_temperature == 0


def test_scores_are_of_unit_projections_unless_told_otherwise() -> None:
    views = views_of_step(0, torch.float64).views
    for normalise in (True, False):
        method = make_method("beclr", SMALL | {"subnetworks": SMALL["subnetworks"] | {"normalise": normalise}}).eval()
        found = method.embed(views)
        with torch.no_grad():
            method.projector[-1].weight *= 3
            method.projector[-1].bias *= 3
        scaled = method.embed(views)
        torch.testing.assert_close(scaled["z"], 3 * found["z"])
        assert torch.allclose(scaled["scores"], found["scores"], rtol=1e-10) == normalise
        assert found["scores"].shape == (2, 24, 6)


def test_the_regulariser_moves_the_weights_out_of_the_dead_state() -> None:
    method = at_step(4, ntxent_weight=0.0)
    with torch.no_grad():
        method.subnetworks.layers[-1].bias[3] += 50
    found = method.loss(method.embed(views_of_step(0, torch.float64).views), views_of_step(0, torch.float64), None)
    assert found["active_subnetworks"] == 1
    assert found["bregman_loss"].item() == pytest.approx(math.log(47))
    found["loss"].backward()
    assert method.subnetworks.layers[-1].bias.grad[3] > 0.1


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=1 is too small for method\.name=.*at least 2"):
        Config().check(images=10, batch_size=1, image_size=32)
    for temperatures in ((0.1, 0.2), (0.1, 0.0), (0.1, -1.0)):
        with pytest.raises(ValueError, match=r"method\.soft_temperatures=.*start >= end > 0"):
            Config(soft_temperatures=temperatures).check(images=10, batch_size=4, image_size=32)
    with pytest.raises(ValueError, match=r"3 views of an image, method\.name=beclr takes 2"):
        Config().check_views(facts(views=3).plan)


def test_ranks_and_micro_batches_change_nothing() -> None:
    check_ranks_and_micro_batches("beclr", SMALL | {"soft_share": 0.5})  # both kinds of winner


def test_resumes_to_the_bit() -> None:
    settings = SMALL | {"subnetworks": {"count": 6, "widths": [8, 1], "dropout": 0.2}, "soft_share": 0.8}
    check_resumes("beclr", settings | {"loss": "margin"})
