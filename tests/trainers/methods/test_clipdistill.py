"""CLIP distillation: its losses against their formulas, a teacher that no state knows, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from configs.recipe import RecipeError, load_recipe
from pipelines.batch import ViewBatch
from pipelines.sources import DataError
from pipelines.views import View
from tests.trainers.parts.tiny_clip import plain_method, settings, write_teacher
from tests.trainers.small_runs import (
    BATCH,
    SmallEncoder,
    check_ranks_and_micro_batches,
    check_resumes,
    facts,
    make_method,
    views_of_step,
)
from trainers.methods import BaseMethod, build_method
from trainers.methods.clipdistill import Config

N, D = 9, 5
LABELS = torch.tensor([0, 2, -1, 1, 1, -1, 0, 2, 2])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings that name a small teacher."""
    return {"teacher": write_teacher(tmp_path_factory.mktemp("teacher")), "pretrained": None}


def given(supervised: bool, seed: int = 0) -> dict[str, Tensor]:
    """Embeddings that depend on the teacher's outputs and on each other, but not altogether."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    outputs = noise(1, N, 24).half()
    z = 0.4 * outputs[..., :D].double() + 0.5 * noise(2, N, D)
    z[..., 0] *= 4  # a dimension beyond the margin
    if not supervised:
        return {"features": noise(2, N, 32), "z": z, "teacher": outputs}
    return {"features": z[1:] + noise(1, N, D), "logits": 3 * noise(1, N, 3), "teacher": outputs}


def loss_of(method: BaseMethod, embeddings: dict[str, Tensor]) -> dict[str, Tensor]:
    batch = ViewBatch(torch.empty(2, 0), LABELS, torch.arange(N))
    return method.loss(embeddings, batch, None)


def distances(rows: list[list[float]], scale: float, floor: float) -> list[list[float]]:
    return [
        [math.sqrt(max(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) * scale**2, floor)) for b in rows]
        for a in rows
    ]


def dependence(x: Tensor, y: Tensor, how: str, scale_x: float = 1 / 32) -> float:
    """unbiased: R*² (Székely & Rizzo 2014, 2.1 to 2.4); biased: R (2007); faithful: R of floored distances."""
    floor = 1e-4 if how == "faithful" else 0.0
    scales = (scale_x, 1 / 32) if how == "faithful" else (1.0, 1.0)
    tables = [distances(rows.double().tolist(), scale, floor) for rows, scale in zip((x, y), scales, strict=True)]
    n = len(x)
    centred = []
    for a in tables:
        rows, total = [sum(row) for row in a], sum(map(sum, a))
        if how == "unbiased":
            both = total / ((n - 1) * (n - 2))
            centred.append(
                [
                    [0.0 if i == j else a[i][j] - (rows[i] + rows[j]) / (n - 2) + both for j in range(n)]
                    for i in range(n)
                ]
            )
        else:
            centred.append([[a[i][j] - (rows[i] + rows[j]) / n + total / n**2 for j in range(n)] for i in range(n)])

    def product(a: list[list[float]], b: list[list[float]]) -> float:
        return sum(x * y for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))

    squared = product(*centred) / math.sqrt(product(centred[0], centred[0]) * product(centred[1], centred[1]))
    return squared if how == "unbiased" else math.sqrt(squared)


@pytest.mark.parametrize("how", ["unbiased", "biased", "faithful"])
def test_the_loss_without_labels_is_its_formula(teacher: dict[str, Any], how: str) -> None:
    weights = {"mse": 0.3, "std": 2.0, "views": 0.6, "teacher": 1.7}
    chosen = {"faithful": True} if how == "faithful" else {"estimator": how}
    method = make_method("clipdistill", settings(teacher, weights=weights, std_margin=1.5, **chosen))
    embeddings = given(supervised=False)
    plain, augmented = embeddings["z"]
    terms = {
        "mse": sum((a - b) ** 2 for a, b in zip(plain.flatten().tolist(), augmented.flatten().tolist(), strict=True))
    }
    terms["mse"] /= N * D
    deviations = [
        math.sqrt(sum((x - sum(column) / N) ** 2 for x in column) / (N - 1) + 1e-4)
        for view in (plain, augmented)
        for column in view.T.tolist()
    ]
    assert min(deviations) < 1.5 < max(deviations)
    terms["std_hinge"] = sum(max(0.0, 1.5 - deviation) for deviation in deviations) / D
    terms["embedding_std"] = sum(deviations) / (2 * D)
    terms["dependence_views"] = dependence(plain, augmented, how)
    terms["dependence_teacher"] = dependence(embeddings["teacher"][0], augmented, how)
    found = loss_of(method, embeddings)
    expected = 0.3 * terms["mse"] + 2 * terms["std_hinge"]
    expected += 0.6 * (1 - terms["dependence_views"]) + 1.7 * (1 - terms["dependence_teacher"])
    assert found["loss"].item() == pytest.approx(expected, rel=1e-11)
    assert found.keys() == {"loss", *terms}
    for name, value in terms.items():
        assert found[name].item() == pytest.approx(value, rel=1e-11), name
        assert not found[name].requires_grad


@pytest.mark.parametrize("how", ["unbiased", "faithful"])
def test_the_supervised_loss_is_its_formula(teacher: dict[str, Any], how: str) -> None:
    own = {"labels": 0.7, "divergence": 1.3, "teacher": 6.0, "temperature": 3.0, "head_hidden": 7}
    method = make_method(
        "clipdistill", settings(teacher, mode="supervised", supervised=own, faithful=how == "faithful")
    )
    embeddings = given(supervised=True)
    logits, outputs = embeddings["logits"][0], embeddings["teacher"][0].double()
    hidden = (outputs @ method.head.weight0.T + method.head.bias0).clamp(min=0)
    taught = hidden @ method.head.weight1.T + method.head.bias1

    def softmax(row: list[float], temperature: float) -> list[float]:
        powers = [math.exp(x / temperature) for x in row]
        return [power / sum(powers) for power in powers]

    known = [(row, label) for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True) if label >= 0]
    of_labels = -sum(math.log(softmax(row, 1)[label]) for row, label in known) / len(known)
    of_head = 0.0
    for ours, theirs in zip(logits.tolist(), taught.tolist(), strict=True):
        pairs = zip(softmax(theirs, 3), softmax(ours, 3), strict=True)
        of_head += 9 * sum(p * math.log(p / q) for p, q in pairs) / N
    of_teacher = dependence(outputs, embeddings["features"][0], how, scale_x=1.0)
    found = loss_of(method, embeddings)
    expected = {"label_loss": of_labels, "divergence": of_head, "dependence_teacher": of_teacher}
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-11), name
    total = 0.7 * of_labels + 1.3 * of_head + 6 * (1 - of_teacher)
    assert found["loss"].item() == pytest.approx(total, rel=1e-11)
    right = sum(max(range(3), key=row.__getitem__) == label for row, label in known)
    assert found["accuracy"].item() == pytest.approx(right / len(known))
    assert found.keys() == {"loss", "accuracy", "teacher_accuracy", *expected}


@pytest.mark.parametrize("changes", [{}, {"faithful": True}, {"mode": "supervised"}], ids=str)
def test_gradients_are_those_of_finite_differences(teacher: dict[str, Any], changes: dict[str, Any]) -> None:
    supervised = "mode" in changes
    method, embeddings = make_method("clipdistill", settings(teacher, **changes)), given(supervised)
    names = ["features", "logits"] if supervised else ["z"]
    leaves = [embeddings[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(
        lambda *values: loss_of(method, embeddings | dict(zip(names, values, strict=True)))["loss"], leaves
    )


def test_half_precision_embeddings_are_computed_in_float32(teacher: dict[str, Any]) -> None:
    for supervised in (False, True):
        mode = {"mode": "supervised"} if supervised else {}
        method = make_method("clipdistill", settings(teacher, **mode), dtype=torch.float32)
        embeddings = {name: value.bfloat16() for name, value in given(supervised).items()}
        found = loss_of(method, embeddings)
        assert all(value.dtype == torch.float32 for value in found.values())
        exact = loss_of(method.double(), {name: value.double() for name, value in embeddings.items()})
        assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-4)


def test_ranks_and_micro_batches_change_nothing(teacher: dict[str, Any]) -> None:
    supervised = {"mode": "supervised", "supervised": {"head_hidden": 8}}
    check_ranks_and_micro_batches("clipdistill", [settings(teacher), settings(teacher, **supervised)])


def test_resumes_to_the_bit(teacher: dict[str, Any]) -> None:
    """With all the state that there can be; without labels it is less (and resumed below)."""
    check_resumes("clipdistill", settings(teacher, mode="supervised"))


# ---- what nobody else knows of the teacher ----


@pytest.mark.parametrize("mode", ["self", "supervised"])
def test_no_state_holds_the_teacher(teacher: dict[str, Any], mode: str) -> None:
    method = plain_method(settings(teacher, mode=mode))
    tower = method.teacher._tower
    own = {id(value) for value in (*tower.parameters(), *tower.buffers())}
    held = [*method.parameters(), *method.buffers(), *method.encoder.state_dict().values()]
    assert not own & {id(value) for value in held}
    assert not any(module is tower for module in method.modules())
    head = "classifier" if mode == "supervised" else "projector"
    expected = {"encoder", head} | ({"head"} if mode == "supervised" else set())
    assert {name.partition(".")[0] for name in method.state_dict()} == expected
    assert not [name for name, _ in method.named_parameters() if name.startswith("head")], "the student's optimizer"
    method.train()
    assert not tower.training
    batch = views_of_step(0, torch.float64)
    outputs = method.targets(batch)["teacher"]
    assert outputs.shape == (1, BATCH, 24)
    assert torch.equal(outputs[0], method.teacher.embed(batch.views[0])), "of the first view"


def test_supervised_trains_on_the_last_view(teacher: dict[str, Any]) -> None:
    method = plain_method(settings(teacher, mode="supervised")).eval()
    views = views_of_step(0, torch.float64).views
    found = method.embed(views)
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        "features": (1, BATCH, 32),
        "logits": (1, BATCH, 3),
    }
    assert torch.equal(found["features"][0], method.encoder(views[1]))
    assert torch.equal(method.embed(views[1:])["logits"], found["logits"])


def test_the_teachers_head_learns_from_labelled_images(teacher: dict[str, Any]) -> None:
    method = plain_method(settings(teacher, mode="supervised"))
    batch = views_of_step(0, torch.float64)
    batch.labels[::2] = -1
    for _ in range(5):
        embeddings = method.embed(batch.views) | method.targets(batch)
        found = method.loss(embeddings, batch, None)
        before = method.head.weight0.clone()
        method.update({name: value.detach() for name, value in embeddings.items()}, batch, None)
        assert not torch.equal(method.head.weight0, before)
    assert int(method.head.steps) == 5
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in method.parameters())
    none = ViewBatch(batch.views, torch.full_like(batch.labels, -1), batch.indices)
    assert method.loss(embeddings, none, None)["loss"].isfinite()


# ---- refusals ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faithful": True, "estimator": "biased"}, "remove estimator=biased"),
        ({"teacher": "ViT-B-16", "pretrained": None}, "needs a tag or a file of weights"),
        ({"teacher": "local-dir:x", "pretrained": "openai"}, "bring theirs"),
        ({"mode": "supervised", "projector": {"layers": 2}}, "projector is not used with mode=supervised"),
        ({"mode": "supervised", "std_margin": 2}, "std_margin is not used"),
        ({"supervised": {"temperature": 2}}, "supervised is not used with mode=self"),
        ({"weights": dict.fromkeys(("mse", "std", "views", "teacher"), 0)}, "all weights are 0"),
        ({"mode": "supervised", "supervised": {"labels": 0, "divergence": 0, "teacher": 0}}, "all weights are 0"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate({"name": "clipdistill", **changes})


def test_views_and_data_that_do_not_fit(teacher: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="makes 1 views"):
        Config().check_views((View(),))
    with pytest.raises(ValueError, match="mode=supervised takes 1, or 2"):
        Config(mode="supervised").check_views((View(),) * 3)
    with pytest.raises(ValueError, match="batch_size=3 is too small"):
        Config().check(images=10, batch_size=3, image_size=32)
    supervised = Config.model_validate({"mode": "supervised", **teacher})
    with pytest.raises(DataError, match="takes one class an image, the data has no labels"):
        build_method(supervised, SmallEncoder(), facts(classes=0))
    with pytest.raises(DataError, match="takes one class an image, the data has several"):
        build_method(supervised, SmallEncoder(), facts(multi_label=True))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 20\nbatch_size: 64\nviews: {plan: mvmr}\nmethod: {name: clipdistill}\n")
    assert load_recipe(recipe).method.pretrained == "laion400m_e32", "a recipe is read without weights at hand"
    with pytest.raises(RecipeError, match=r"method\.name=clipdistill takes 2"):
        load_recipe(recipe, ["views.repeat=2"])
