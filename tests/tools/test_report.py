"""`python -m tools.report`: what is computed, what the page holds, and what it does where something is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from typer.testing import CliRunner, Result

from pipelines.choice import build_loader
from pipelines.sources import DataConfig, open_source
from pipelines.views import ViewsConfig
from tests.pipelines.packing import photo
from tests.tools.report_runs import ROWS, add_record, make_run
from tools import report
from tools.reporting import samples
from tools.reporting.charts import Line, line_chart
from tools.reporting.html import tag
from tools.reporting.pictures import class_groups
from trainers.features import load_encoder

SECTIONS = ["overview", "curves", "evaluations", "views", "neighbours", "similarities", "maps", "recipe"]
CPU = torch.device("cpu")
EVIL = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>\"'"


class Seen(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, {key: value or "" for key, value in attributes}))
        self._inside = name

    def handle_endtag(self, name: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for element, attributes in self.elements if element == name]


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(report.app, [str(argument) for argument in arguments])


def page_of(*arguments: Any) -> Seen:
    """Of one run, at its default place."""
    done = call(*arguments, "--images", 40)
    assert done.exit_code == 0, done.output
    return Seen((Path(arguments[0]) / "report.html").read_text())


@pytest.fixture(autouse=True)
def _without_umap(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles for half a minute."""
    if "slow" not in request.keywords:
        monkeypatch.setitem(sys.modules, "umap", None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoint and evaluation, and its page."""
    run = make_run(tmp_path_factory.mktemp("runs") / "first")
    add_record(run, pictures={"confusion": "c.png"}, warnings=["the edge of the grid"])
    photo(8, 8).save(run / "evaluations" / "c.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "umap", None)
        page_of(run)
    return run


# ---- what is computed -----------------------------------------------------------------------------------


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


def test_the_encoder_comes_out_as_it_went_in(finished: Path) -> None:
    encoder = load_encoder(finished)
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


# ---- the page -------------------------------------------------------------------------------------------


def test_a_page_holds_everything(finished: Path) -> None:
    seen = Seen((finished / "report.html").read_text())
    assert [one["id"] for one in seen.all("section")] == SECTIONS
    assert [one["href"] for one in seen.all("a")] == [f"#{name}" for name in SECTIONS]
    for text in ("Loss", "feature_std", "effective_rank", "71.25", "87.65 [80.00, 93.00]", "bank: 120 images", "t-SNE"):
        assert text in seen.text, text
    assert "the edge of the grid" in seen.text
    assert "umap-learn is not installed" in seen.text
    assert "of the held-out part" in seen.text
    assert "drawn at random" in seen.text
    images = seen.all("img")
    assert all(one["src"].startswith("data:image/") and one["alt"] for one in images)
    assert len(images) >= 1 + 8 * 5 + 8 * 7, "the confusion, views of two epochs, neighbours"
    loads = [one for _, one in seen.elements if re.match(r"(https?:)?//", one.get("src", one.get("href", "")))]
    assert not loads
    assert "default-src 'none'" in next(one["content"] for one in seen.all("meta") if "http-equiv" in one)
    wrong, right = ([one for one in seen.all("figure") if one.get("class") == kind] for kind in ("wrong", "right"))
    assert right
    assert wrong


def test_several_runs_stand_side_by_side(finished: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "second", method={"name": "nnclr", "queue_size": 64}, optim={"name": "sgd", "lr": 0.25})
    add_record(other, value=50.0, description="another bank")
    output = tmp_path / "both.html"
    done = call(finished, other, "--output", output, "--images", 20)
    assert done.exit_code == 0, done.output
    seen = Seen(output.read_text())
    assert "protocols differ" in seen.text
    marked = re.findall(r'<tr class="differs"><th scope="row">([^<]*)', output.read_text())
    assert {"method", "learning rate (optim.lr)", "method.queue_size"} <= set(marked)
    assert not {"encoder", "batch size", "seed"} & set(marked)
    loss = next(one for one in seen.all("svg") if one.get("aria-label", "").startswith("train/loss"))
    assert [line["name"] for line in json.loads(loss["data-hover"])["lines"]] == ["first", "second"]
    twins = [make_run(tmp_path / folder / "twin", checkpoint=False) for folder in "ab"]
    done = call(*twins, "--output", output)
    assert done.exit_code == 0
    text = Seen(output.read_text()).text
    assert all(str(twin) in text for twin in twins), "equal names are told apart"


def test_nothing_can_be_injected(tmp_path: Path) -> None:
    evil = EVIL.replace("/", "\u2215")  # names of files have no slash
    classes = [f"a{evil}", "b & <i>c"]
    for name in classes:
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            photo(20, 20, number).save(tmp_path / "images" / name / f"{number}.jpg")
    rows = [*ROWS, {"step": 3, "epoch": 1.5, f"train/{EVIL}": 1.0}]
    data = {"source": "folder", "root": str(tmp_path / "images"), "holdout": 0.3}
    run = make_run(tmp_path / f"run{evil}", data, rows=rows)
    add_record(
        run, EVIL[8:13], protocol=EVIL, metric=EVIL, description=EVIL, encoder=EVIL, labels=EVIL, data=EVIL,
        value=EVIL, n_test=EVIL, table=[{EVIL: EVIL}], warnings=[EVIL], pictures={EVIL: EVIL},
    )  # fmt: skip
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"seed": 0, EVIL: EVIL}))
    seen = page_of(run)
    assert len(seen.all("script")) == 1
    assert all(one["src"].startswith("data:") for one in seen.all("img"))
    assert not [key for _, one in seen.elements for key in one if key.startswith("on")]
    assert not seen.all("i")
    assert not seen.all("b")
    assert seen.text.count(EVIL) >= 8, "shown as it is"
    assert "b & <i>c" in seen.text
    assert tag("p", "<b>", title='"><b>') == '<p title="&quot;&gt;&lt;b&gt;">&lt;b&gt;</p>'


def test_a_picture_elsewhere_is_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", checkpoint=False)
    photo(8, 8).save(tmp_path / "secret.png")
    add_record(run, pictures={"a": "../../secret.png", "b": str(tmp_path / "secret.png"), "c": "gone.png"})
    seen = page_of(run)
    assert seen.text.count("is left out") >= 2
    assert "no longer there" in seen.text


# ---- what may be missing --------------------------------------------------------------------------------


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rows=ROWS[:1], checkpoint=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "epo')
    seen = page_of(run)
    assert "no checkpoint yet" in seen.text
    assert "No evaluations yet" in seen.text
    assert "cannot be read" not in seen.text, "a last line that is being written is no damage"
    assert len([one for one in seen.all("svg") if "train/loss" in one.get("aria-label", "")]) == 1
    assert len(seen.all("img")) == 8 * 5, "views need no checkpoint"


def test_damage_is_told(tmp_path: Path) -> None:
    rows = [*ROWS, {"step": 4, "epoch": 2.0, "train/loss": float("nan"), "holdout/feature_std": 0.01}]
    run = make_run(tmp_path / "run", rows=rows, checkpoint=False)
    log = run / "metrics.jsonl"
    log.write_text("{nonsense\n[1]\n" + log.read_text())
    add_record(run, "not", protocol="x")
    (run / "evaluations" / "not.json").write_text('{"protocol"')
    (run / "evaluations" / "list.json").write_text("[]")
    seen = page_of(run)
    for text in (
        "2 of the 6 lines of metrics.jsonl",
        "train/loss was NaN or infinite at step 4",
        "feature_std ended at 0.01",
        "evaluations/not.json cannot be read",
        "evaluations/list.json is not the record",
    ):
        assert text in seen.text, text
    (run / "recipe.yaml").write_text("views: {plan: nothing}\n")
    (run / "metrics.jsonl").unlink()
    seen = page_of(run)
    assert "there is no metrics.jsonl" in seen.text
    assert "views: plan: no plan 'nothing'" in seen.text
    (run / "recipe.yaml").write_text("a: [")
    assert "recipe.yaml cannot be read" in page_of(run).text


def test_data_that_is_gone(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            photo(12, 12, number).save(tmp_path / "images" / name / f"{number}.jpg")
    run = make_run(tmp_path / "run", {"source": "folder", "root": str(tmp_path / "images"), "holdout": 0.0})
    seen = page_of(run)
    assert "nothing is held out" in seen.text
    assert "too few for a map" in seen.text
    shutil.rmtree(tmp_path / "images")
    add_record(run)
    seen = page_of(run)
    assert seen.text.count("Not shown: folder:") == 4
    assert not seen.all("img")
    assert "87.65" in seen.text
    assert [one for one in seen.all("svg") if "train/loss" in one.get("aria-label", "")]


def test_images_without_labels(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(30):
        photo(12, 12, number).save(tmp_path / "images" / f"{number}.jpg")
    seen = page_of(make_run(tmp_path / "run", {"source": "folder", "root": str(tmp_path / "images")}))
    assert "nothing says what is right" in seen.text
    assert not [one for one in seen.all("figure") if one.get("class")]
    assert "There are no labels to colour by" in seen.text


def test_images_of_several_classes(tmp_path: Path) -> None:
    root = tmp_path / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    names = [f"{number:06}" for number in range(30)]
    for number, name in enumerate(names):
        photo(12, 12, number).save(root / "JPEGImages" / f"{name}.jpg")
        found = ["dog"] if number % 2 else ["dog", "cat"]
        body = "".join(f"<object><name>{one}</name></object>" for one in found)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{body}</annotation>")
    (root / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(names))
    seen = page_of(make_run(tmp_path / "run", {"source": "voc07", "root": str(tmp_path), "holdout": 0.4}))
    assert "cat, dog" in seen.text
    assert "Only images of a single class are coloured" in seen.text
    assert "100.0 % are of the same class" in seen.text, "a dog is everywhere"


def test_many_classes_have_a_short_legend() -> None:
    source = open_source(DataConfig(source="digits"), "train").select(range(200))
    labels = torch.arange(200) % 60
    object.__setattr__(source, "labels", labels)
    object.__setattr__(source, "classes", tuple(f"class {number}" for number in range(60)))
    groups, remark = class_groups(samples.Sample(source, source, "", True))
    assert len(groups) == 25
    assert "24 most frequent of 60" in remark
    assert groups[0][0] == "other images"
    assert sorted(np.concatenate([places for _, places, _ in groups]).tolist()) == list(range(200))


def test_features_that_make_no_map() -> None:
    assert "collapsed" in str(samples.why_no_map(torch.ones(20, 4) / 2))
    assert "not finite" in str(samples.why_no_map(torch.full((20, 4), torch.nan)))
    assert "too few" in str(samples.why_no_map(torch.randn(9, 4)))
    assert samples.why_no_map(torch.randn(20, 4)) is None


@pytest.mark.slow
def test_umap_keeps_far_groups_apart() -> None:
    pytest.importorskip("umap")
    groups = torch.eye(6)[torch.arange(60) % 2] + 0.01 * torch.randn(60, 6)
    places = samples.umap_map(groups)
    assert places is not None
    centres = [places[start::2].mean(0) for start in (0, 1)]
    spread = max(places[start::2].std(0).max() for start in (0, 1))
    assert np.linalg.norm(centres[0] - centres[1]) > 3 * spread


# ---- in a browser ---------------------------------------------------------------------------------------


def open_in_browser(page: Path) -> tuple[str, str]:
    """The DOM after its scripts have run, and what the browser said on its console."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on this machine")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    home = os.environ | {"HOME": str(page.parent)}
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={page.parent / 'profile'}", page.as_uri()],
        capture_output=True, text=True, check=True, timeout=120, env=home,
    )  # fmt: skip
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_a_browser_shows_the_page_without_an_error(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    shutil.copy(finished / "report.html", page)
    dom, console = open_in_browser(page)
    seen = Seen(dom)
    assert [one["id"] for one in seen.all("section")] == SECTIONS
    assert not console, "no error, nothing that the page's policy refused"
    assert len([one for one in seen.all("line") if one.get("class") == "cursor"]) == len(
        [one for one in seen.all("svg") if "data-hover" in one]
    ), "the script ran"


def test_a_pointer_shows_values_and_injected_scripts_do_not_run(finished: Path, tmp_path: Path) -> None:
    page, whole = tmp_path / "report.html", (finished / "report.html").read_text()
    injected = "<script>document.title = 'injected'</script>"
    page.write_text(whole.replace("</body>", f"{injected}</body>"))
    dom, console = open_in_browser(page)
    assert "<title>injected" not in dom
    assert "Content Security Policy" in console, "and such a refusal is seen by the test above"
    move = """<script>
      const chart = document.querySelector("svg[data-hover]"), box = chart.getBoundingClientRect();
      chart.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 5, clientY: box.top + 5}));
    </script>"""
    page.write_text(
        re.sub(r'script-src [^"]*', "script-src 'unsafe-inline'", whole).replace("</body>", f"{move}</body>")
    )
    dom, console = open_in_browser(page)
    assert not console
    tip = re.search(r'<div id="tip"[^>]*>([^<]*)</div>', dom)
    assert tip is not None
    assert tip[1] == "epoch 1\nfirst: 5"


# ---- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["."], "it has no recipe.yaml"),
        (["run/recipe.yaml"], "is not a folder"),
        (["run", "run"], "given twice"),
        (["run", "run/../run"], "given twice"),
        (["run", "--output", "page.pdf"], "ends in .html"),
        (["run", "--output", "nowhere/page.html"], "is not a folder that can be written to"),
        (["run", "--output", "folder.html"], "is a folder"),
        (["run", "--device", "cuda"], "no CUDA device"),
    ],
)
def test_mistakes_end_in_one_readable_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_run(tmp_path / "run", checkpoint=False)
    (tmp_path / "folder.html").mkdir()
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("report.html"))
