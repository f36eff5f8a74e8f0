"""What a report shows, against training's own batches, scikit-learn and counts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from pipelines.choice import build_loader
from pipelines.sources import DataConfig, open_source
from pipelines.views import ViewsConfig
from tests.tools.report_runs import Seen, make_run
from tools import report
from tools.reporting import samples
from tools.reporting.charts import Line, line_chart
from trainers.features import load_encoder

SECTIONS = ["overview", "curves", "evaluations", "views", "neighbours", "similarities", "maps", "recipe"]
CPU = torch.device("cpu")
EVIL = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>\"'"


@pytest.mark.parametrize("plan", ["digits", "mvmr"])
def test_the_views_shown_are_those_of_training(plan: str) -> None:
    config, views = DataConfig(source="digits", limit=64), ViewsConfig(plan=plan, size=8).resolve()
    source = open_source(config, "pretrain")
    settings = {"size": 8, "batch_size": 16, "seed": 5, "device": CPU}
    loader = build_loader("resident", source, views, config=config, **settings)
    batch = next(iter(loader.epoch(1)))[0]
    where = {"size": 8, "seed": 5, "epoch": 1, "config": config, "device": CPU}
    drawn = samples.drawn_views(source, views, batch.indices, **where)
    shown, trained = (samples.to_pixels(found, source).astype(int) for found in (drawn, batch.views))
    assert shown.shape == (2, 16, 8, 8, 3)
    assert np.abs(shown - trained).max() <= 1
    other = samples.drawn_views(source, views, batch.indices, **(where | {"epoch": 2}))
    assert not torch.equal(other, drawn)


def test_pixels_come_back_from_normalised_images() -> None:
    source = open_source(DataConfig(source="digits"), "holdout")
    pixels = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    mean, std = torch.tensor(source.mean), torch.tensor(source.std)
    normalised = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    assert np.array_equal(samples.to_pixels(normalised, source), pixels.numpy())


def test_pairs_are_those_of_scikit_learn() -> None:
    first, second = torch.randn(2, 30, 7).unbind(0)
    positives, negatives = samples.cosines_of_pairs(first, second)
    expected = cosine_similarity(first, second)
    np.testing.assert_allclose(positives, np.diag(expected), atol=1e-6)
    np.testing.assert_allclose(negatives, expected[~np.eye(30, dtype=bool)], atol=1e-6)
    rough = positives.round(1), negatives.round(1)  # ties
    truth = np.r_[np.ones(len(rough[0])), np.zeros(len(rough[1]))]
    assert samples.probability_of_order(*rough) == pytest.approx(roc_auc_score(truth, np.concatenate(rough)), abs=1e-12)


def test_neighbours_are_those_of_scikit_learn_and_classes_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator), dim=1) for n in (20, 50))
    cosines, places = samples.neighbours(queries, bank, 6)
    distances, expected = NearestNeighbors(n_neighbors=6, metric="cosine").fit(bank).kneighbors(queries)
    assert np.array_equal(places.numpy(), expected)
    np.testing.assert_allclose(cosines.numpy(), 1 - distances, atol=1e-6)
    labels, theirs = torch.randint(-1, 3, (20,)), torch.randint(0, 3, (50,))
    brute = np.mean([int(a == b) for a in labels.tolist() for b in theirs.tolist()])
    assert samples.chance_of_same_class(labels, theirs) == pytest.approx(brute, abs=1e-6)
    several, others = torch.randint(-1, 2, (20, 4)).float(), torch.randint(-1, 2, (50, 4)).float()
    brute = np.mean([int(any(x == 1 and y == 1 for x, y in zip(a, b, strict=True))) for a in several for b in others])
    assert samples.chance_of_same_class(several, others) == pytest.approx(brute, abs=1e-6)


def test_the_encoder_comes_out_as_it_went_in(tmp_path: Path) -> None:
    encoder = load_encoder(make_run(tmp_path / "run"))
    assert encoder.module is not None
    before = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    config = DataConfig(source="digits")
    plan = ViewsConfig(plan="digits", size=8).resolve()
    for views in (plan, plan[:1]):
        sample = samples.choose_sample(config, 20)
        positives, _ = samples.pair_cosines(encoder, sample.queries, views, config, CPU, 0)
        assert len(positives) == 20
        assert positives.max() < 1 - 1e-6, "two draws"
    samples.unit_features(encoder, sample.queries, config, CPU)
    assert all(torch.equal(value, before[name]) for name, value in encoder.module.state_dict().items())


@pytest.mark.parametrize(
    ("limit", "holdout", "split"), [(10, 0.1, "holdout"), (1000, 0.1, "holdout"), (10, 0.0, "train")]
)
def test_samples_are_bounded_and_apart_and_never_of_test(limit: int, holdout: float, split: str) -> None:
    sample = samples.choose_sample(DataConfig(source="digits", holdout=holdout), limit)
    assert len(sample.queries) <= limit
    assert len(sample.bank) <= limit
    assert (sample.queries.split, sample.bank.split) == (split, "train")
    assert not set(sample.queries.ids.tolist()) & set(sample.bank.ids.tolist())
    assert len(sample.queries.labels.unique()) >= min(limit, 10) - 3, "spread over the classes"


def test_a_line_is_where_its_values_are() -> None:
    x, y = [0.0, 1.0, 4.0], [2.0, -3.0, 7.0]
    chart = Seen(line_chart([Line("a", 0, x, y)], title="t", x_label="epoch"))
    places = np.array([pair.split(",") for pair in chart.all("polyline")[0]["points"].split()], dtype=float)
    ticks = [
        float(text)
        for text in re.findall(r">(-?[\d.]+)</text>", line_chart([Line("a", 0, x, y)], title="t", x_label=""))
    ]
    assert ticks
    for values, axis in ((x, 0), (y, 1)):
        slope, offset = np.polyfit(values, places[:, axis], 1)
        np.testing.assert_allclose(np.polyval([slope, offset], values), places[:, axis], atol=0.1)
        assert slope > 0 if axis == 0 else slope < 0
    many = Seen(line_chart([Line("a", 0, range(10**5), [3.0] * 10**5)], title="t", x_label="epoch"))
    assert len(many.all("polyline")[0]["points"].split()) == 500
    assert line_chart([Line("a", 0, [1.0], [1.0])], title="t", x_label="epoch").count("<circle") == 1


def test_colours_can_be_seen_in_light_and_in_darkness() -> None:
    css = (Path(report.__file__).parent / "reporting" / "page.css").read_text()
    themes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in css.split("@media (prefers-color", 1)]

    def luminance(colour: str) -> float:  # WCAG 2.2
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    def contrast(one: str, two: str) -> float:
        low, high = sorted((luminance(one), luminance(two)))
        return (high + 0.05) / (low + 0.05)

    for theme in themes:
        lines = [theme[f"c{number}"] for number in range(8)]
        assert len(set(lines)) == 8
        assert min(contrast(colour, theme["paper"]) for colour in lines) >= 3
        for name in ("ink", "quiet", "link", "good", "bad"):
            assert contrast(theme[name], theme["paper"]) >= 4.5, name
        assert contrast(theme["quiet"], theme["raised"]) >= 4.5
        assert contrast(theme["ink"], theme["mark"]) >= 4.5
        assert contrast(theme["warn"], theme["warn-paper"]) >= 4.5
