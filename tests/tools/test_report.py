"""`python -m tools.report`: what the page holds, and what it does where something is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from pipelines.sources import DataConfig, open_source
from tests.pipelines.packing import photo
from tests.tools.report_runs import ROWS, Seen, add_record, make_run
from tools import report
from tools.reporting import samples
from tools.reporting.html import tag
from tools.reporting.pictures import class_groups

SECTIONS = ["overview", "curves", "evaluations", "views", "neighbours", "similarities", "maps", "recipe"]
CPU = torch.device("cpu")
EVIL = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)>\"'"


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
