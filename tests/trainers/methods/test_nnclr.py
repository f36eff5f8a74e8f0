"""NNCLR: its loss from the formula, whom it takes for a neighbour, what its queue holds."""

import math

import pytest
import torch
from torch import Tensor

from pipelines.batch import ViewBatch
from tests.trainers.small_runs import check_ranks_and_micro_batches, check_resumes, make_method
from trainers.methods.nnclr import Config

HEADS = {"projector": {"hidden": 32, "output": 16}, "predictor": {"hidden": 24}}
# No shift after the projector's last layer: the predictor's BatchNorm takes it away, so its gradient is mere rounding.
WITHOUT_SHIFT = HEADS | {"projector": {"hidden": 32, "output": 16, "batchnorm": "hidden", "bias": False}}
N, D = 8, 16


def embeddings(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, N, D, generator=generator, dtype=torch.float64) for name in ("z", "p")}


def batch(start: int) -> ViewBatch:
    numbers = torch.arange(start, start + N)
    return ViewBatch(torch.zeros(2, 0, 3, 8, 8), numbers % 3, numbers)


def by_formula(anchors: list[list[Tensor]], p: Tensor, temperature: float) -> float:
    losses = []
    for view in (0, 1):
        for i in range(N):
            a = anchors[view][i] / anchors[view][i].norm()
            logits = [float(a @ row / row.norm()) / temperature for row in p[1 - view]]
            losses.append(math.log(sum(map(math.exp, logits))) - logits[i])
    return sum(losses) / len(losses)


def expected_scalars(method, now, images: ViewBatch, past: list[tuple[Tensor, int, int, int]], exclude: bool):
    """Loss and diagnostics from a plain list of (row, id, label, step) that the queue should hold."""
    step = max(when for *_, when in past) + 1
    anchors: list[list[Tensor]] = [[], []]
    cosines, ages, same = [], [], []
    for view in (0, 1):
        for z, identity, label in zip(now["z"][view], images.indices.tolist(), images.labels.tolist(), strict=True):
            allowed = [one for one in past if not exclude or one[1] != identity]
            best = max(allowed, key=lambda one, z=z: float(one[0] @ z / one[0].norm() / z.norm()))
            anchors[view].append(best[0])
            cosines.append(float(best[0] @ z / best[0].norm() / z.norm()))
            ages.append(step - best[3])
            same.append(best[2] == label)
    return {
        "loss": by_formula(anchors, now["p"], method.temperature),
        "neighbour_similarity": sum(cosines) / len(cosines),
        "neighbour_age": sum(ages) / len(ages),
        "neighbour_same_class": sum(same) / len(same),
    }


@pytest.mark.parametrize("enqueue", ["first", "both"])
@pytest.mark.parametrize("exclude", [True, False])
def test_loss_and_diagnostics_are_those_of_the_formula(enqueue: str, exclude: bool) -> None:
    capacity = 21  # no multiple of the batch: the queue wraps around in the middle of one
    method = make_method("nnclr", {**HEADS, "queue_size": capacity, "enqueue": enqueue, "exclude_same_image": exclude})
    past: list[tuple[Tensor, int, int, int]] = []
    for step in range(5):
        then, images = embeddings(step), batch(step * N % 16)
        method.update(then, images, None)
        for i, (identity, label) in enumerate(zip(images.indices.tolist(), images.labels.tolist(), strict=True)):
            past += [(then["z"][v, i], identity, label, step) for v in range(1 if enqueue == "first" else 2)]
    now, images = embeddings(9), batch(4)  # these images are in the queue
    now["z"] += method.support.rows[:N]  # some close to something in it
    scalars = method.loss(now, images, None)
    expected = expected_scalars(method, now, images, past[-capacity:], exclude)
    for name, value in expected.items():
        assert scalars[name].item() == pytest.approx(value, rel=1e-6), name  # rows are kept normalised in float32
    assert scalars["queue_filled"] == 1


def test_an_image_that_may_find_itself_does() -> None:
    own = {}
    for exclude in (True, False):
        method = make_method("nnclr", {**HEADS, "queue_size": 2 * N, "exclude_same_image": exclude})
        now = embeddings(0)
        for step in range(2):
            method.update(now if step else embeddings(1), batch(step * N), None)
        now["z"][1] = now["z"][0]
        own[exclude] = method.loss(now, batch(N), None)["neighbour_similarity"].item()
    assert own[False] == pytest.approx(1, abs=1e-6)
    assert own[True] < 0.9


def test_until_the_queue_is_full_an_image_is_its_own_neighbour() -> None:
    method = make_method("nnclr", {**HEADS, "queue_size": 2 * N, "temperature": 0.2})
    for step, filled in enumerate((0, 0.5)):
        now = embeddings(step)
        scalars = method.loss(now, batch(step * N), None)
        expected = by_formula([list(view) for view in now["z"]], now["p"], 0.2)
        assert scalars["loss"].item() == pytest.approx(expected, rel=1e-12)
        assert scalars["queue_filled"] == filled
        assert "neighbour_age" not in scalars
        method.update(now, batch(step * N), None)
    assert "neighbour_age" in method.loss(embeddings(2), batch(0), None)


def test_an_image_that_owns_the_whole_queue_stands_for_itself() -> None:
    method = make_method("nnclr", {**HEADS, "queue_size": 1, "temperature": 0.2})
    images = batch(0)
    images.indices[:] = 5
    method.update(embeddings(0), images, None)
    now = embeddings(1)
    scalars = method.loss(now, images, None)
    expected = by_formula([list(view) for view in now["z"]], now["p"], 0.2)
    assert scalars["loss"].item() == pytest.approx(expected, rel=1e-12)
    assert scalars["neighbour_age"].isnan()


def test_faithful_begins_with_noise_that_is_nobodys() -> None:
    method = make_method("nnclr", {**HEADS, "queue_size": 500, "faithful": True})
    noise = method.support.rows.clone()
    torch.testing.assert_close(noise.norm(dim=1), torch.ones(500, dtype=torch.float64), rtol=0, atol=0.01)
    assert noise.mean().abs() < 0.01
    now = embeddings(0)
    scalars = method.loss(now, batch(0), None)
    units = torch.nn.functional.normalize(now["z"].flatten(0, 1), dim=1)
    assert scalars["neighbour_similarity"].item() == pytest.approx((units @ noise.T).amax(1).mean().item(), rel=1e-2)
    assert scalars["neighbour_same_class"].isnan()
    method.update(now, batch(0), None)
    assert method.support.ids[:N].tolist() == list(range(N))
    again = method.loss(now, batch(0), None)  # nothing is excluded
    assert again["neighbour_similarity"] > scalars["neighbour_similarity"]


def test_classes_are_not_guessed() -> None:
    method = make_method("nnclr", {**HEADS, "queue_size": N})
    images = batch(0)
    images.labels[:] = torch.tensor([1, -1] * (N // 2))
    method.update(embeddings(0), images, None)
    images.indices += N
    scalars = method.loss(embeddings(0), images, None)  # first view: each finds its twin, which half know to be so
    _, indices = method.support.nearest(embeddings(0)["z"].flatten(0, 1))
    theirs = images.labels[indices.squeeze(1)]
    known = (theirs >= 0) & (images.labels.repeat(2) >= 0)
    assert 0 < known.sum() < 2 * N
    assert scalars["neighbour_same_class"] == 1
    images.labels = torch.ones(N, 20)  # of several classes
    method.update(embeddings(1), images, None)
    assert (method.support.labels == -1).all()
    assert method.loss(embeddings(2), images, None)["neighbour_same_class"].isnan()


def test_what_cannot_work_is_refused() -> None:
    Config(queue_size=1000).check(images=1000, batch_size=2, image_size=32)
    Config(queue_size=2000, faithful=True).check(images=1000, batch_size=2, image_size=32)
    with pytest.raises(ValueError, match=r"method\.queue_size=1001 is larger than the 1000 training images: neighbours "
                       "would be older embeddings of the same image; at most 1000"):  # fmt: skip
        Config(queue_size=1001).check(images=1000, batch_size=2, image_size=32)
    with pytest.raises(ValueError, match=r"batch_size=1 is too small for method\.name=.*at least 2"):
        Config(queue_size=10).check(images=1000, batch_size=1, image_size=32)
    with pytest.raises(ValueError, match="takes 2"):
        Config().check_views(())


def test_ranks_and_micro_batches_change_nothing() -> None:
    check_ranks_and_micro_batches("nnclr", {**WITHOUT_SHIFT, "queue_size": 40, "enqueue": "both"})


def test_resumes_to_the_bit() -> None:
    check_resumes("nnclr", {**HEADS, "queue_size": 40})
