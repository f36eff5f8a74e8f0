"""``evaluate.py zeroshot`` as a user runs it, on a CLIP model of random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.sources import DataConfig, open_source
from tests.test_evaluate import evaluate, last_line
from tests.trainers.parts.tiny_clip import MEAN, READING, STD, write_teacher
from tests.trainers.run_folders import write_run
from trainers.features import load_encoder
from trainers.parts.clip_text import TEMPLATES, class_prompts
from trainers.protocols import Job
from trainers.protocols.zeroshot import Settings, score
from trainers.state import find_checkpoint

VIEWS = {"plan": "mvmr", "override": {"blur": 0.0}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("clip"), text=READING)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> Path:
    """Of CLIP distillation, untrained."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    method = {"name": "clipdistill", "teacher": teacher, "pretrained": None}
    write_run(folder, method | {"projector": {"hidden": 32, "output": 16}}, views=VIEWS)
    return folder


def kept(folder: Path) -> dict[str, Any]:
    newest = max(folder.glob("zeroshot-*.json"), key=lambda path: path.stat().st_mtime)
    record: dict[str, Any] = json.loads(newest.read_text())
    return record


def by_hand(teacher: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines [360, 10] of the test digits and their labels, with open_clip alone."""
    import open_clip

    model, tokenize = open_clip.create_model(teacher).eval(), open_clip.get_tokenizer(teacher)
    test = open_source(DataConfig(source="digits"), "test")
    pixels = torch.stack([torch.as_tensor(test.images[i]) for i in range(len(test))])
    images = pixels.permute(0, 3, 1, 2).float() / 255
    images = torch.nn.functional.interpolate(images, (16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        found = model.encode_image(images, normalize=True)
        text = model.encode_text(tokenize(class_prompts(test.classes, TEMPLATES)), normalize=True)
    classes = text.view(10, len(TEMPLATES), -1).mean(1)
    return found @ (classes / classes.norm(dim=1, keepdim=True)).T, test.labels


def test_teacher_and_student(run: Path, teacher: str) -> None:
    checkpoint = find_checkpoint(run)
    assert checkpoint is not None
    before = (checkpoint / "method.safetensors").read_bytes()
    student = last_line(evaluate(run, "zeroshot", str(run)))
    assert (checkpoint / "method.safetensors").read_bytes() == before
    assert (student["metric"], student["n_test"], student["scored"]) == ("top1", 360, "student")
    assert student["value"] == student["top1"] == student["student_cosine_top1"]
    assert student["interval_low"] <= student["top1"] <= student["interval_high"]
    assert 0.5 < student["holdout_cosine"] <= 1
    whole = kept(run / "evaluations")
    assert [row["embedding"].split()[0] for row in whole["table"]] == ["student", "student", "teacher", "teacher"]
    assert whole["pictures"].keys() == {"confusion"}
    for words in ("without labels", "ridge regression", "held-out part (240 images)", "360 test images"):
        assert words in student["description"]

    alone = last_line(evaluate(run, "zeroshot", str(run), "scored=teacher", "data.holdout=0"))
    cosines, labels = by_hand(teacher)
    expected = 100 * (cosines.argmax(1) == labels).double().mean().item()
    margins = cosines.topk(2).values.diff().abs()
    unsure = 100 * (margins < 2e-3).double().mean().item()  # embeddings are float16
    assert alone["top1"] == pytest.approx(expected, abs=max(unsure, 1e-6))
    assert unsure < 50
    assert alone["top1"] == student["teacher_cosine_top1"]
    assert "student_cosine_top1" not in alone
    assert "ridge" not in alone["description"]


def test_projections_and_the_divergence(run: Path) -> None:
    record = last_line(evaluate(run, "zeroshot", str(run), "embedding=z", "similarity=bregman"))
    assert record["value"] == record["student_bregman_top1"]
    assert "standardised projections z" in record["description"]
    assert kept(run / "evaluations")["table"][0]["embedding"] == "student (z), mapped"


def test_labels_of_training_images_are_never_looked_at(run: Path, teacher: str, monkeypatch) -> None:
    data = DataConfig(source="digits")
    encoder = load_encoder(run)
    splits = [open_source(data, split) for split in ("train", "holdout", "test")]
    job = Job(encoder, Settings(), data, torch.device("cpu"), run)
    monkeypatch.setattr(Job, "splits", lambda self: tuple(splits))
    monkeypatch.setattr(Job, "features", lambda self, source: (features[source.split], source.labels))
    features = {source.split: torch.randn(len(source), 6) for source in splits}
    first = score(job)
    for source in splits[:2]:
        source.labels.fill_(3)
    again = score(job)
    assert first.scores == again.scores


def test_baselines_need_a_teacher_by_name(tmp_path: Path, teacher: str) -> None:
    pixels = ("zeroshot", "--baseline", "pixels", "--data", "digits")
    record = last_line(evaluate(tmp_path, *pixels, f"teacher={teacher}"))
    assert record["teacher"] == teacher
    path = tmp_path / "templates.txt"
    path.write_text("the digit {}\n")
    single = last_line(evaluate(tmp_path, *pixels, f"teacher={teacher}", f"templates={path}"))
    assert single["templates"] == ["the digit {}"]
    assert single["student_cosine_top1"] == single["student_bregman_top1"], "one prompt a class: the same order"
    assert "1 prompt a class (templates.txt)" in single["description"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name one: teacher="),
        (["teacher=ViT-B-16"], "needs a tag or a file"),
        (["teacher=local-dir:nowhere"], "nowhere"),
        (["teacher=ViT-B-17", "pretrained=openai"], "open_clip has no such model"),
        (["teacher=TEACHER", "embedding=z"], "takes a run folder"),
        (["teacher=TEACHER", "templates=none.txt"], "none.txt"),
        (["teacher=TEACHER", "names=none.txt"], "none.txt"),
        (["teacher=TEACHER", "data.holdout=0"], "data.holdout above 0"),
        (["similarity=euclid"], "choose from cosine, bregman"),
        (["scored=both"], "choose from student, teacher"),
        (["techer=x"], "did you mean teacher?"),
    ],
)
def test_mistakes_end_in_one_readable_message(
    tmp_path: Path, teacher: str, arguments: list[str], expected: str
) -> None:
    given = [argument.replace("TEACHER", teacher) for argument in arguments]
    done = evaluate(tmp_path, "zeroshot", "--baseline", "pixels", "--data", "digits", *given)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
