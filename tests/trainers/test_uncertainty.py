"""Calibration, doubt and what it is good for: against scikit-learn, torchmetrics, scipy and brute force."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error

from tests.trainers.run_folders import write_run
from tests.trainers.small_runs import SmallEncoder
from trainers.calibration import brier_score, equal_mass, equal_width, fit_temperature, negative_log_likelihood
from trainers.dropout import MCDropout, add_dropout
from trainers.posterior import entropy_of
from trainers.state import CheckpointError
from trainers.uncertainty import dropout_passes, ood_scores, risk_coverage
from trainers.uncertainty_pictures import doubts_picture
from trainers.whole import load_method, method_config

N, C = 300, 5


@pytest.fixture
def predictions() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(N, C, generator=generator, dtype=torch.float64)
    return logits, torch.multinomial((logits / 1.7).softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("bins", [5, 15])
def test_calibration_error_against_torchmetrics(predictions, bins: int) -> None:
    logits, labels = predictions
    probabilities = logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    ours = equal_width(confidence, predicted == labels, bins)
    theirs = multiclass_calibration_error(probabilities, labels, C, n_bins=bins, norm="l1")
    assert ours.error == pytest.approx(100 * theirs.item(), rel=1e-6)
    assert ours.error > 3
    assert ours.counts.sum() == N


def test_calibration_error_by_hand_and_on_the_edges() -> None:
    confidence = torch.tensor([0.25, 0.5, 0.5, 0.75, 1.0], dtype=torch.float64)
    correct = torch.tensor([True, False, True, False, True])
    found = equal_width(confidence, correct, 4)
    assert found.counts.tolist() == [1, 2, 1, 1]  # an edge belongs to the bin below it
    assert found.accuracy.tolist() == [1, 0.5, 0, 1]
    assert found.error == pytest.approx(100 * (0.75 + 2 * 0 + 0.75 + 0) / 5)


@pytest.mark.parametrize("count", [N, 7])
def test_bins_of_equal_mass_against_a_sort(predictions, count: int) -> None:
    confidence, predicted = predictions[0].softmax(1)[:count].max(1)
    correct = predicted == predictions[1][:count]
    found = equal_mass(confidence, correct, 15)
    if count == N:
        order = np.argsort(confidence.numpy())
        parts = np.split(order, 15)
        gaps = [abs(confidence.numpy()[p].mean() - correct.numpy()[p].mean()) for p in parts]
        assert found.error == pytest.approx(100 * np.mean(gaps), rel=1e-12)
        assert set(found.counts.tolist()) == {20}
    assert len(found.edges) == 16
    assert found.counts.sum() == count
    assert (found.edges.diff() >= 0).all()


def test_proper_scores_against_scikit_learn(predictions) -> None:
    logits, labels = predictions
    probabilities = logits.softmax(1)
    assert negative_log_likelihood(probabilities, labels) == pytest.approx(log_loss(labels, probabilities), rel=1e-12)
    assert brier_score(probabilities, labels) == pytest.approx(
        brier_score_loss(labels, probabilities, scale_by_half=False), rel=1e-12
    )
    certain = torch.eye(3)
    assert brier_score(certain, torch.tensor([0, 1, 0])) == pytest.approx(2 / 3)
    assert np.isfinite(negative_log_likelihood(certain, torch.tensor([0, 1, 0])))


def test_the_temperature_is_the_best_there_is(predictions) -> None:
    logits, labels = predictions
    found, at_end = fit_temperature(logits, labels)
    best = minimize_scalar(
        lambda t: log_loss(labels, (logits / t).softmax(1)), bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(best.x, rel=1e-4)
    assert not at_end
    assert 1.4 < found < 2.1, "labels were drawn at temperature 1.7"
    sure = 5.0 * torch.eye(3)
    assert fit_temperature(sure, torch.arange(3)) == (1e-3, True), "all right: the colder the better"
    assert fit_temperature(sure, torch.tensor([1, 2, 0])) == (1e3, True), "all wrong: the hotter the better"


def test_risk_coverage_is_the_mean_over_all_orders_of_equals() -> None:
    doubt = torch.tensor([0.1, 0.5, 0.5, 0.5, 0.9, 0.9])
    correct = torch.tensor([True, False, True, True, False, True])
    curves = []
    for order in itertools.permutations(range(6)):
        if all(doubt[a] <= doubt[b] for a, b in itertools.pairwise(order)):
            errors = [not correct[i] for i in order]
            curves.append([sum(errors[:k]) / k for k in range(1, 7)])
    expected = np.mean(curves, 0)
    found = risk_coverage(doubt, correct)
    np.testing.assert_allclose(found.risk.numpy(), expected, rtol=1e-12)
    assert found.area == pytest.approx(100 * expected.mean())
    assert found.accuracy_at(0.8) == pytest.approx(100 * (1 - expected[4]))  # 4.8 images, rounded up
    assert found.accuracy_at(1) == pytest.approx(100 * 4 / 6)
    assert risk_coverage(torch.zeros(6), correct).area == pytest.approx(100 / 3), "no doubt at all: the plain error"


def test_selective_accuracy_at_whole_numbers_of_images() -> None:
    curve = risk_coverage(torch.arange(20.0), torch.arange(20) < 18)
    assert curve.accuracy_at(0.9) == 100
    assert curve.accuracy_at(0.95) == pytest.approx(100 * 18 / 19)


def test_foreign_images_against_counts() -> None:
    generator = torch.Generator().manual_seed(1)
    inside = torch.randint(12, (100,), generator=generator).float()
    outside = torch.randint(4, 20, (70,), generator=generator).float()
    wins = (inside[:, None] < outside).double() + 0.5 * (inside[:, None] == outside).double()
    limits = sorted(inside.tolist())
    allowed = next(limit for limit in limits if (inside <= limit).double().mean() >= 0.95)
    auroc, fpr95 = ood_scores(inside, outside)
    assert auroc == pytest.approx(100 * wins.mean().item(), rel=1e-12)
    assert fpr95 == pytest.approx(100 * (outside <= allowed).double().mean().item(), rel=1e-12)
    assert ood_scores(torch.zeros(5), torch.ones(3)) == (100, 0)


def plain_passes(encoder: nn.Module, head, batches: list[Tensor], passes: int, seed: int) -> tuple[Tensor, Tensor]:
    """All features [T, N, d] and probabilities [T, N, C], by a loop that keeps them."""
    seeds = torch.Generator().manual_seed(seed)
    encoder.eval()
    for module in encoder.modules():
        if isinstance(module, MCDropout):
            module.mode = "always"
    features = []
    for images in batches:
        torch.manual_seed(int(torch.randint(2**62, (), generator=seeds)))
        features.append(torch.stack([encoder(images).detach() for _ in range(passes)]))
    stacked = torch.cat(features, 1)
    return stacked.double(), torch.stack([head(rows) for rows in stacked]).double()


def test_passes_against_a_loop_that_keeps_them_all() -> None:
    torch.manual_seed(0)
    encoder, linear = SmallEncoder(), nn.Linear(32, 4).requires_grad_(False)
    add_dropout(encoder, 0.4)
    with torch.no_grad():
        encoder(torch.randn(64, 3, 8, 8))  # BatchNorm has seen something
    encoder.train()
    batches = list(torch.randn(50, 3, 8, 8).split(20))

    def head(rows: Tensor) -> Tensor:
        return (30 * linear(rows)).softmax(1)

    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    found = dropout_passes(encoder, {"head": head}, batches, 7, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(module.training for module in encoder.modules())
    assert all(module.mode == "train" for module in encoder.modules() if isinstance(module, MCDropout))
    again = dropout_passes(encoder, {"head": head}, batches, 7, seed=3)
    assert torch.equal(found.heads["head"].mutual_information, again.heads["head"].mutual_information)
    other = dropout_passes(encoder, {"head": head}, batches, 7, seed=4)
    assert not torch.equal(found.heads["head"].entropy, other.heads["head"].entropy)

    features, probabilities = plain_passes(encoder, head, batches, 7, 3)
    of = found.heads["head"]
    mean = probabilities.mean(0)
    total = -(mean * mean.log()).sum(1)
    expected = -(probabilities * probabilities.log()).nan_to_num(0).sum(2).mean(0)
    torch.testing.assert_close(of.probabilities.double(), mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(of.entropy.double(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of.expected_entropy.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(of.entropy, of.expected_entropy + of.mutual_information, rtol=1e-5, atol=1e-6)
    assert of.mutual_information.max() > 0.05
    torch.testing.assert_close(found.variance.double(), features.var(0).mean(1), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.dimension_mean, features.mean((0, 1)), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.dimension_variance, features.var(0).mean(0), rtol=1e-5, atol=1e-8)


def test_passes_that_agree_know_no_mutual_information() -> None:
    encoder = SmallEncoder()
    add_dropout(encoder, 0.5)
    batches = [torch.randn(6, 3, 8, 8)]
    heads = {
        "uniform": lambda rows: torch.full((len(rows), 8), 1 / 8),
        "certain": lambda rows: torch.eye(8)[: len(rows)],
    }
    found = dropout_passes(encoder, heads, batches, 3, seed=0).heads
    torch.testing.assert_close(found["uniform"].entropy, torch.full((6,), np.log(8), dtype=torch.float32))
    assert found["certain"].entropy.abs().max() == 0
    for of in found.values():
        assert of.mutual_information.max() < 1e-6
    with pytest.raises(ValueError, match="at least 2"):
        dropout_passes(encoder, heads, batches, 1, seed=0)
    assert entropy_of(torch.tensor([[1.0, 0.0]])).item() == 0


def test_doubts_that_hardly_differ_can_be_drawn() -> None:
    """As those of an untrained network do: by float32's last bits, or not at all."""
    correct = torch.arange(40) % 2 == 0
    close = torch.full((40,), 0.9).nextafter(torch.full((40,), 2.0))
    close[::3] = 0.9
    drawn = doubts_picture({"close": (close, correct, close[:5]), "same": (torch.zeros(40), correct | True, None)}, "x")
    assert drawn.startswith(b"\x89PNG")


PROBSIMCLR = {"name": "probsimclr", "dropout": 0.3, "projector": {"hidden": 32, "output": 12}}


def test_a_whole_method_comes_back_from_its_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    written = write_run(run, PROBSIMCLR)
    state = torch.get_rng_state()
    loaded = load_method(run)
    assert torch.equal(torch.get_rng_state(), state)
    assert method_config(run).name == "probsimclr"
    assert not any(module.training for module in loaded.modules())
    views = torch.randn(2, 5, 3, 8, 8)
    assert torch.equal(loaded.embed(views)["z"], written.embed(views)["z"])
    assert torch.equal(load_method(run, 18).embed(views)["z"], written.embed(views)["z"])
    with pytest.raises(CheckpointError, match="no whole checkpoint of step 19"):
        load_method(run, 19)


def test_a_run_that_is_not_what_it_says_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, PROBSIMCLR)
    recipe = (run / "recipe.yaml").read_text()
    for old, new, message in (
        ("output: 12", "output: 13", r"method.safetensors does not fit the model: projector"),
        ("name: probsimclr", "name: simsiam", "its method section is damaged.*simsiam"),
        ("dropout: 0.3", "dropout: 3", "its method section is damaged"),
        ("batch_size: 64", "batch_size: many", "is damaged"),
    ):
        assert old in recipe
        (run / "recipe.yaml").write_text(recipe.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            load_method(run)
    (run / "recipe.yaml").write_text("- 1")
    with pytest.raises(CheckpointError, match="holds no mapping"):
        load_method(run)
    (run / "recipe.yaml").write_text(recipe)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        load_method(run)
