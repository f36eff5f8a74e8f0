"""KMCLR: its loss from the formula, its centres as positives, its settings. The k-means: test_prototypes.py."""

import math

import pytest
import torch
from torch import Tensor

from pipelines.batch import ViewBatch
from tests.trainers.small_runs import STEPS, check_ranks_and_micro_batches, check_resumes, make_method
from trainers.methods.kmclr import Config

HEADS = {"projector": {"hidden": 32, "output": 16}, "predictor": {"hidden": 24}}
# No shift after the projector's last layer: the predictor's BatchNorm takes it away, so its gradient is mere rounding.
WITHOUT_SHIFT = HEADS | {"projector": {"hidden": 32, "output": 16, "batchnorm": "hidden", "bias": False}}
N, D, TEMPERATURE = 12, 16, 0.2


def embeddings(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, N, D, generator=generator, dtype=torch.float64) for name in ("z", "p")}


def batch(start: int) -> ViewBatch:
    numbers = torch.arange(start, start + N)
    return ViewBatch(torch.zeros(2, 0, 3, 8, 8), numbers % 3, numbers)


def by_formula(anchors: Tensor, p: Tensor) -> float:
    losses = []
    for view in (0, 1):
        for i, anchor in enumerate(anchors[view]):
            logits = [float(anchor @ row / row.norm() / anchor.norm()) / TEMPERATURE for row in p[1 - view]]
            losses.append(math.log(sum(map(math.exp, logits))) - logits[i])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("faithful", [False, True])
def test_loss_and_diagnostics_are_those_of_the_formula(faithful: bool) -> None:
    method = make_method("kmclr", {**HEADS, "centres": 7, "temperature": TEMPERATURE, "faithful": faithful})
    for step in range(3):
        method.update(embeddings(step), batch(N * step), None)
    now, images = embeddings(9), batch(0)
    centres = method.prototypes.centres
    unit = torch.nn.functional.normalize
    if faithful:
        ids = torch.stack([torch.stack([(centres - z).norm(dim=1).argmin() for z in view]) for view in now["z"]])
    else:
        ids = (unit(now["z"], dim=2) @ unit(centres, dim=1).T).argmax(2)
    scalars = method.loss(now, images, None)
    assert scalars["loss"].item() == pytest.approx(by_formula(centres[ids], now["p"]), rel=1e-12)
    cosines = (unit(centres[ids], dim=2) * unit(now["z"], dim=2)).sum(2)
    assert scalars["neighbour_similarity"].item() == pytest.approx(cosines.mean().item(), rel=1e-6)
    classes = method.prototypes.classes / method.prototypes.classes.sum(1, keepdim=True)
    same = classes[ids, images.labels.expand(2, N)]
    assert scalars["neighbour_same_class"].item() == pytest.approx(same[~same.isnan()].mean().item(), rel=1e-6)
    assert 0 < scalars["assignment_entropy"] < 1
    assert 0 < scalars["occupancy"] <= 1


def test_only_the_first_view_moves_the_centres() -> None:
    method = make_method("kmclr", {**HEADS, "centres": 7})
    method.update(embeddings(0), batch(0), None)
    expected = torch.nn.functional.normalize(embeddings(0)["z"][0, -7:], dim=1)
    torch.testing.assert_close(method.prototypes.centres, expected)


def test_until_there_are_centres_an_image_stands_for_itself() -> None:
    method = make_method("kmclr", {**HEADS, "centres": 2 * N, "temperature": TEMPERATURE})
    for step in range(2):
        now = embeddings(step)
        scalars = method.loss(now, batch(step * N), None)
        assert scalars["loss"].item() == pytest.approx(by_formula(now["z"], now["p"]), rel=1e-12)
        assert "occupancy" not in scalars
        method.update(now, batch(step * N), None)
    assert "occupancy" in method.loss(embeddings(2), batch(0), None)


def test_settings_reach_the_centres() -> None:
    default = make_method("kmclr", HEADS).prototypes
    assert len(default.centres) == 400
    assert (default.metric, default.decay, default.reseed_every, default.revive) == ("cosine", None, 3 * STEPS, True)
    changed = make_method("kmclr", {**HEADS, "update": "ema", "reseed_epochs": 0, "revive": False}).prototypes
    assert (changed.decay, changed.reseed_every, changed.revive) == (0.99, 0, False)
    assert make_method("kmclr", {**HEADS, "update": "ema", "decay": 0.5}).prototypes.decay == 0.5
    assert make_method("kmclr", {**HEADS, "reseed_epochs": 0.01}).prototypes.reseed_every == 1
    faithful = make_method("kmclr", {**HEADS, "faithful": True}).prototypes
    assert (faithful.metric, faithful.is_ready) == ("euclidean", True)


def test_what_cannot_work_is_refused() -> None:
    Config(centres=1000).check(images=1000, batch_size=2, image_size=32)
    with pytest.raises(ValueError, match=r"method\.centres=1001 is larger than the 1000 training images.*at most 1000"):
        Config(centres=1001).check(images=1000, batch_size=2, image_size=32)
    with pytest.raises(ValueError, match=r"batch_size=1 is too small for method\.name=.*at least 2"):
        Config().check(images=1000, batch_size=1, image_size=32)
    with pytest.raises(ValueError, match=r"decay=0\.9 is not used with update=mean; remove it, or set update=ema"):
        Config(decay=0.9)
    with pytest.raises(ValueError, match="takes 2"):
        Config().check_views(())


def test_ranks_and_micro_batches_change_nothing() -> None:
    settings = {**WITHOUT_SHIFT, "centres": 30, "temperature": TEMPERATURE, "reseed_epochs": 0.6}
    euclidean = {**WITHOUT_SHIFT, "centres": 20, "temperature": TEMPERATURE, "faithful": True, "update": "ema"}
    check_ranks_and_micro_batches("kmclr", [settings, euclidean])


def test_resumes_to_the_bit() -> None:
    check_resumes("kmclr", {**HEADS, "centres": 30, "reseed_epochs": 0.8})
