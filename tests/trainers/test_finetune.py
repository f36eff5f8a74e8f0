"""Fine-tuning against loops and formulas written out here."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.config import LoaderConfig
from pipelines.jpeg.decoder import jpeg_decoder
from pipelines.labelled import LabelledViews, epoch_batches, steps_of_epoch
from pipelines.sources import DataConfig, DataError, Source, open_source
from pipelines.subsets import label_subset
from pipelines.views import View
from trainers.finetune import (
    Classifier,
    FinetuneConfig,
    Fit,
    HeldOut,
    build_finetune_optimizer,
    default_batch_size,
    default_epochs,
    fit,
    held_out_score,
    predict,
)

CPU = torch.device("cpu")
CROP = View(crop="random_resized", crop_scale=(0.4, 1.0))


class Small(nn.Module):
    """Two convolutions and two BatchNorms: a network that a test can fit in a second."""

    features = 64

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 64, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(images))))))
        return maps.amax((2, 3))


def small_classifier(seed: int = 0, head: Any = "zeros") -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Small(), 10, head)


def digits(budget: str = "4-per-class", split: Any = "train") -> Source:
    source = open_source(DataConfig(), split)
    return source.select(label_subset(source, budget)) if split == "train" else source


def views_of(source: Source, batch_size: int = 16, seed: int = 0, **settings: Any) -> LabelledViews:
    return LabelledViews(source, CROP, size=8, batch_size=batch_size, seed=seed, device=CPU, **settings)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Batches.


def test_every_image_is_seen_once_in_even_batches_of_at_least_two() -> None:
    for images in (2, 3, 5, 31, 32, 33, 51, 65, 129):
        for batch_size in (2, 3, 16, 32, 128):
            batches = epoch_batches(images, batch_size, seed=3, epoch=1)
            sizes = [len(batch) for batch in batches]
            assert sorted(torch.cat(batches).tolist()) == list(range(images))
            assert len(sizes) == steps_of_epoch(images, batch_size)
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) >= 2
            assert max(sizes) <= max(batch_size, 3), "three images cannot be cut into batches of two"
    assert not torch.equal(torch.cat(epoch_batches(51, 16, 3, 1)), torch.cat(epoch_batches(51, 16, 3, 2)))
    assert not torch.equal(torch.cat(epoch_batches(51, 16, 3, 1)), torch.cat(epoch_batches(51, 16, 4, 1)))


@pytest.mark.skipif(jpeg_decoder() is None, reason="our decoder cannot be built here")
def test_a_streamed_loader_shows_what_the_resident_one_shows() -> None:
    source = digits()
    streamed, resident = views_of(source, loading=LoaderConfig(loader="native", workers=1)), views_of(source)
    for epoch in (0, 1):
        for a, b in zip(streamed.epoch(epoch), resident.epoch(epoch), strict=True):
            assert torch.equal(a.labels, b.labels)
            assert torch.equal(a.labels, source.labels[a.indices])
            assert a.views.shape == (1, len(a.labels), 3, 8, 8)
            torch.testing.assert_close(a.views, b.views, atol=1.5 / 255 / min(source.std), rtol=0)
    streamed.close()
    with pytest.raises(DataError, match="at least two"):
        views_of(source.select([0]))


def test_the_defaults_are_simclrs_where_there_are_enough_images() -> None:
    assert default_batch_size(1_281_167) == default_batch_size(12_811) == 256
    assert default_epochs(0.01, steps_of_epoch(12_811, 256)) == 60
    assert default_epochs(0.1, steps_of_epoch(128_116, 256)) == 30
    assert default_epochs(1.0, steps_of_epoch(1_281_167, 256)) == 30
    assert default_batch_size(100) == 32
    assert default_epochs(0.1, 4) == 50, "200 steps"


# The optimizer.


def test_two_learning_rates_move_the_two_parts() -> None:
    """The first step of Nesterov's momentum is (1 + momentum) times the gradient."""
    model, views = small_classifier(head="normal"), views_of(digits(), batch_size=64)
    before = copy.deepcopy(model)
    batch = next(iter(views.epoch(0)))
    gradients = torch.autograd.grad(
        F.cross_entropy(before.train()(batch.views[0]), batch.labels), list(before.parameters())
    )
    config = FinetuneConfig(batch_size=64, momentum=0.8, schedule="constant")
    assert fit(model, views, config, lr_body=0.01, lr_head=0.5, epochs=1) is not None
    for (name, old), new, gradient in zip(before.named_parameters(), model.parameters(), gradients, strict=True):
        lr = 0.5 if name.startswith("head.") else 0.01
        assert gradient.abs().max() > 0
        torch.testing.assert_close(new, old - lr * 1.8 * gradient, msg=name)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_training_is_torchs_sgd_in_a_plain_loop(schedule: Any) -> None:
    source, epochs = digits(), 3
    model = small_classifier(seed=1)
    plain = copy.deepcopy(model)
    found = fit(
        model,
        views_of(source),
        FinetuneConfig(batch_size=16, schedule=schedule, weight_decay=0.01),
        lr_body=0.03,
        lr_head=0.2,
        epochs=epochs,
    )
    body = plain.encoder
    assert isinstance(body, Small)
    groups: list[dict[str, Any]] = [
        {"params": [body.conv1.weight, body.conv2.weight], "weight_decay": 0.01, "peak": 0.03},
        {"params": [*body.bn1.parameters(), *body.bn2.parameters()], "weight_decay": 0.0, "peak": 0.03},
        {"params": [plain.head.weight], "weight_decay": 0.01, "peak": 0.2},
        {"params": [plain.head.bias], "weight_decay": 0.0, "peak": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, 1.0, momentum=0.9, nesterov=True)
    plain.train()
    step = 0
    for epoch in range(epochs):
        for batch in views_of(source).epoch(epoch):
            share = 0.5 * (1 + math.cos(math.pi * step / (3 * epochs))) if schedule == "cosine" else 1.0
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share
            optimizer.zero_grad()
            F.cross_entropy(plain(batch.views[0]), batch.labels).backward()
            optimizer.step()
            step += 1
    assert step == 9, "40 images are three batches"
    assert found is not None
    assert same(found.state, state_of(plain))
    assert found.epoch == epochs


def test_lars_adapts_the_body_alone() -> None:
    model = small_classifier(head="normal")
    config = FinetuneConfig(optimizer="lars", momentum=0.5)
    optimizer = build_finetune_optimizer(config, model, lr_body=2.0, lr_head=0.1)
    before = copy.deepcopy(model)
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert new.grad is not None
        lr = 0.1 if name.startswith("head.") else 2.0
        if name in ("encoder.conv1.weight", "encoder.conv2.weight"):
            lr *= 0.001 * float(old.detach().norm() / new.grad.norm())
        torch.testing.assert_close(new, old - lr * new.grad, msg=name)


def test_adam_has_two_learning_rates_as_well() -> None:
    """Adam's first step is the learning rate, in the direction against the gradient."""
    model = small_classifier(head="normal")
    optimizer = build_finetune_optimizer(FinetuneConfig(optimizer="adam"), model, lr_body=1e-4, lr_head=1e-2)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        lr = 1e-2 if name.startswith("head.") else 1e-4
        torch.testing.assert_close(new, old - lr, rtol=0, atol=2e-7, msg=name)
    with pytest.raises(ValueError, match="momentum is not used by adam"):
        FinetuneConfig(optimizer="adam", momentum=0.5)


# Which epoch is kept.


def scripted(scores: list[tuple[float, float]], seen: list[dict[str, Tensor]]) -> Any:
    """A held-out part that gives these scores, and notes the weights that it is shown."""

    def validate(model: nn.Module) -> HeldOut:
        seen.append(state_of(model))
        return HeldOut(*scores[len(seen) - 1])

    return validate


@pytest.mark.parametrize(
    ("scores", "patience", "best", "last"),
    [
        ([(10, 1), (50, 1), (40, 1), (30, 1), (90, 1)], 2, 2, 4),
        ([(10, 1), (50, 1), (40, 1), (30, 1), (90, 1)], 0, 5, 5),
        ([(50, 3), (50, 2), (50, 2), (50, 2.5), (49, 1)], 0, 2, 5),  # equals: the smaller loss, then the earlier
        ([(50, 3), (50, 2), (50, 2), (50, 2.5), (49, 1)], 1, 2, 3),
    ],
)
def test_the_best_epoch_on_the_held_out_part_is_kept(
    scores: list[tuple[float, float]], patience: int, best: int, last: int
) -> None:
    seen: list[dict[str, Tensor]] = []
    rows: list[dict[str, float]] = []
    found = fit(
        small_classifier(),
        views_of(digits()),
        FinetuneConfig(patience=patience),
        lr_body=0.05,
        lr_head=0.05,
        epochs=5,
        validate=scripted(scores, seen),
        report=rows.append,
    )
    assert found is not None
    assert (found.epoch, len(seen)) == (best, last)
    assert same(found.state, seen[best - 1])
    assert not same(found.state, seen[best - 2])
    assert found.history == rows
    assert [row["held_out_top1"] for row in rows] == [top1 for top1, _ in scores[:last]]


def test_divergence_gives_what_was_good_before_or_nothing() -> None:
    settings: dict[str, Any] = {"lr_body": 1e30, "lr_head": 1e30, "epochs": 4}
    assert fit(small_classifier(), views_of(digits()), FinetuneConfig(), **settings) is None
    seen: list[dict[str, Tensor]] = []
    validate = scripted([(50, 1), (60, math.nan)], seen)
    settings |= {"lr_body": 0.01, "lr_head": 0.01}
    found = fit(small_classifier(), views_of(digits()), FinetuneConfig(), **settings, validate=validate)
    assert found is not None
    assert (found.epoch, len(seen)) == (1, 2)


def test_a_fit_is_better_by_its_held_out_score() -> None:
    def one(held_out: HeldOut | None) -> Fit:
        return Fit({}, 1, held_out, [])

    assert one(None).better_than(None)
    assert one(HeldOut(60, 2)).better_than(one(HeldOut(50, 1)))
    assert one(HeldOut(60, 1)).better_than(one(HeldOut(60, 2)))
    assert not one(HeldOut(60, 2)).better_than(one(HeldOut(60, 2)))


def test_batchnorm_trains_and_evaluation_leaves_it_alone() -> None:
    model = small_classifier()
    start = state_of(model)
    views, holdout = views_of(digits()), digits(split="holdout")
    found = fit(model, views, FinetuneConfig(), lr_body=0.05, lr_head=0.05, epochs=2)
    assert found is not None
    assert found.state["encoder.bn1.num_batches_tracked"] == 6, "two epochs of three steps, none in evaluation"
    assert not torch.equal(found.state["encoder.bn1.running_mean"], start["encoder.bn1.running_mean"])
    before = state_of(model)
    score = held_out_score(holdout, 8, CPU)(model)
    logits = predict(model, holdout, 8, CPU)
    assert same(before, state_of(model))
    assert logits.shape == (240, 10)
    assert score.top1 == pytest.approx(100 * float((logits.argmax(1) == holdout.labels).float().mean()))
    assert score.loss == pytest.approx(float(F.cross_entropy(logits, holdout.labels)))


def test_low_precision_trains_float32_weights() -> None:
    results = {}
    for precision in ("auto", "float32", "bfloat16"):
        config = FinetuneConfig(precision=precision)  # type: ignore[arg-type]
        found = fit(small_classifier(), views_of(digits()), config, lr_body=0.05, lr_head=0.05, epochs=1)
        assert found is not None
        assert {value.dtype for value in found.state.values()} == {torch.float32, torch.int64}
        results[precision] = found
    assert same(results["auto"].state, results["float32"].state), "on a CPU"
    assert not same(results["bfloat16"].state, results["float32"].state)
    assert results["bfloat16"].history[0]["loss"] == pytest.approx(results["float32"].history[0]["loss"], rel=0.02)
