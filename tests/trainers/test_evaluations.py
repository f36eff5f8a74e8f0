"""kNN and logistic regression against scikit-learn, features against a plain loop, and frozen means frozen."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from kernels import nearest
from pipelines.sources import DataConfig, open_source
from trainers.encoders import EncoderConfig
from trainers.features import extract, features_of, random_encoder, raw_pixels
from trainers.knn import knn_votes
from trainers.linear import fit_logistic, search_logistic
from trainers.monitors import effective_rank, feature_std
from trainers.scores import top_accuracy
from trainers.similarity import view_similarities

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.1), (50, 0.01)])
def test_knn_against_scikit_learn(digits, k: int, temperature: float) -> None:
    x, y = digits
    bank, queries = x[:1200].double(), x[1200:].double()
    votes = knn_votes(queries, bank, y[:1200], 10, [(k, temperature)])[k, temperature]
    unit = [m / m.norm(dim=1, keepdim=True) for m in (bank, queries)]

    def weigh(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance - 1) / temperature)  # cosine distance = 1 - cosine

    reference = KNeighborsClassifier(k, weights=weigh, metric="cosine", algorithm="brute").fit(unit[0], y[:1200])
    expected = reference.predict_proba(unit[1].numpy())
    share = (votes / votes.sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(share, expected, atol=1e-9)


def test_knn_asks_no_more_than_the_bank_holds(digits) -> None:
    x, y = digits
    votes = knn_votes(x[20:40], x[:20], y[:20], 10, [(200, 0.1), (1, 0.1)])
    assert votes[200, 0.1].shape == (20, 10)


@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("excluded", [False, True])
def test_nearest_against_one_sort(k: int, excluded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1300, 16, generator=generator, dtype=torch.float64)
    bank = torch.randn(9001, 16, generator=generator, dtype=torch.float64)
    ids = (torch.randint(50, (1300,), generator=generator), torch.randint(50, (9001,), generator=generator))
    scores, indices = nearest(queries, bank, k=k, exclude=ids if excluded else None)
    full = queries.numpy() @ bank.numpy().T
    if excluded:
        full[ids[0].numpy()[:, None] == ids[1].numpy()[None, :]] = -np.inf
    order = np.argsort(-full, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices.numpy(), order)
    np.testing.assert_allclose(scores.numpy(), np.take_along_axis(full, order, 1), rtol=1e-12)


def test_nearest_refuses_what_does_not_fit() -> None:
    a, b = torch.zeros(3, 4), torch.zeros(5, 4)
    for arguments, message in (
        ((a, torch.zeros(5, 3)), r"must share D"),
        ((a, b, 6), "k=6 must lie between 1 and the bank's 5 rows"),
        ((a, b, 0), "k=0"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest(arguments[0], arguments[1], k=arguments[2] if len(arguments) > 2 else 1)
    with pytest.raises(ValueError, match="backend='gpu'"):
        nearest(a, b, backend="gpu")


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_logistic_against_scikit_learn(digits, l2: float) -> None:
    x, y = digits[0][:600].double(), digits[1][:600]
    stronger, fit = fit_logistic(x, y, 10, [100.0, l2])
    assert stronger.weight.norm() < fit.weight.norm()
    standard = ((x - fit.mean) / fit.scale).numpy()
    reference = LogisticRegression(C=1 / (l2 * len(x)), max_iter=5000, tol=1e-9).fit(standard, y)

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        logits = standard @ weight.T + bias
        losses = np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1)) + logits.max(1)
        return (losses - logits[np.arange(len(y)), y.numpy()]).mean() + 0.5 * l2 * (weight**2).sum()

    ours, theirs = (
        objective(fit.weight.numpy(), fit.bias.numpy()),
        objective(reference.coef_, reference.intercept_),
    )
    assert ours <= theirs * (1 + 1e-5)
    others = digits[0][600:].double()
    expected = reference.predict_proba(((others - fit.mean) / fit.scale).numpy())
    np.testing.assert_allclose(fit.logits(others).softmax(1).numpy(), expected, atol=1e-2)


def test_search_picks_the_best_on_the_held_out_part(digits) -> None:
    x, y = digits
    search = search_logistic(x[:300], y[:300], x[300:600], y[300:600], 10, grid=(1e-3, 1e-1, 1e1))
    inputs = ((x - x[:300].mean(0)) / x[:300].std(0, unbiased=False).clamp_min(1e-6)).numpy()
    refitted = {}
    for l2 in (1e-3, 1e-1, 1e1):
        reference = LogisticRegression(C=1 / (l2 * 300), max_iter=5000, tol=1e-8).fit(inputs[:300], y[:300])
        refitted[l2] = 100 * reference.score(inputs[300:600], y[300:600])
    assert search.holdout_top1 == pytest.approx(refitted, abs=0.7)  # two images of 300 may fall on the other side
    assert search.holdout_top1[search.best.l2] == max(search.holdout_top1.values())
    assert search.at_edge == (search.best.l2 in (1e-3, 1e1))


def test_constant_features_and_shuffled_labels_give_chance(digits) -> None:
    x, y = digits
    x = torch.cat([x, torch.ones(len(x), 3)], 1)
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    search = search_logistic(x[:800], shuffled[:800], x[800:1200], shuffled[800:1200], 10)
    assert top_accuracy(search.best.logits(x[1200:]), shuffled[1200:]) < 16


def test_what_tells_classes_apart_may_lie_at_the_end_of_the_spectrum() -> None:
    """Classes differ in directions whose standard deviation is 3e-3 of the others', as float32 features have them."""
    generator = torch.Generator().manual_seed(0)
    count, width = 1500, 256
    labels = torch.randint(4, (count + 1000,), generator=generator)
    rows = torch.randn(len(labels), width, generator=generator)
    rows[:, width // 2 :] += 3 * torch.randn(4, width // 2, generator=generator)[labels]
    rows[:, width // 2 :] *= 1e-3
    rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    features = rows @ rotation
    train, test = slice(count), slice(count, None)
    (fit,) = fit_logistic(features[train], labels[train], 4, [1e-6])
    (exact,) = fit_logistic(features[train].double(), labels[train], 4, [1e-6])
    assert fit.converged
    expected = top_accuracy(exact.logits(features[test].double()), labels[test])
    assert expected > 80
    assert top_accuracy(fit.logits(features[test]), labels[test]) > expected - 3


def test_top_accuracy_against_a_count() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5]])
    labels = torch.tensor([1, 2, 0])
    assert top_accuracy(scores, labels) == pytest.approx(100 / 3)
    assert top_accuracy(scores, labels, 2) == pytest.approx(200 / 3)


def test_extraction_leaves_the_encoder_as_it_was_and_repeats() -> None:
    source = open_source(DataConfig(source="digits"), "test")
    encoder = random_encoder(EncoderConfig(arch="resnet8x4"), source, 8, seed=0)
    before = {n: b.clone() for n, b in encoder.module.state_dict().items()}
    encoder.module.train()  # a caller's mistake
    features = extract(encoder, source, CPU)
    assert features.shape == (360, 256)
    assert all(torch.equal(b, before[n]) for n, b in encoder.module.state_dict().items())
    pixels = torch.from_numpy(np.stack([source.images[i] for i in range(360)])).permute(0, 3, 1, 2) / 255
    normal = (pixels - torch.tensor(source.mean).view(3, 1, 1)) / torch.tensor(source.std).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(features[:5], encoder.module.eval()(normal[:5]), rtol=1e-4, atol=1e-5)
    raw = extract(raw_pixels(source, 8), source, CPU)
    torch.testing.assert_close(raw, normal.flatten(1), rtol=1e-5, atol=1e-6)


def test_features_are_cached_by_weights_and_data(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = open_source(DataConfig(source="digits"), "holdout")
    config = EncoderConfig(arch="resnet8x4")
    first = features_of(random_encoder(config, source, 8, seed=0), source, CPU).clone()  # else it is the file itself
    cached = list((tmp_path / "runs/evaluations/features").glob("*.safetensors"))
    assert len(cached) == 1
    monkeypatch.setattr("trainers.features.extract", lambda *a: pytest.fail("extracted again"))
    assert torch.equal(features_of(random_encoder(config, source, 8, seed=0), source, CPU), first)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    other = features_of(random_encoder(config, source, 8, seed=1), source, CPU)
    assert not torch.equal(other, first)
    features_of(random_encoder(config, source, 8, seed=0), source.select(range(100)), CPU)
    assert len(list((tmp_path / "runs/evaluations/features").glob("*.safetensors"))) == 3
    cached[0].write_bytes(b"damaged")
    assert torch.equal(features_of(random_encoder(config, source, 8, seed=0), source, CPU), first)


def test_collapse_figures_at_their_extremes() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4000, 16, generator=generator)
    point = torch.ones(4000, 16) + 1e-6 * spread
    assert feature_std(spread) == pytest.approx(1, abs=0.02)
    assert feature_std(point) < 1e-5
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(spread[:, :1] @ torch.ones(1, 16)) == pytest.approx(1, abs=1e-3)


def test_view_similarities_against_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(9, 5, generator=generator)
    z2 = z1 + 0.1 * torch.randn(9, 5, generator=generator)
    unit = torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1)
    matrix = unit @ unit.T
    rows = torch.arange(18)
    mask = torch.ones(18, 18, dtype=torch.bool)
    mask[rows, rows] = False
    mask[rows, (rows + 9) % 18] = False
    positive, negative = view_similarities(z1, z2)
    assert positive.item() == pytest.approx(matrix[rows, (rows + 9) % 18].mean().item(), rel=1e-5)
    assert negative.item() == pytest.approx(matrix[mask].mean().item(), rel=1e-4)
