"""MV-MR: every term against its formula in plain loops, what it refuses, and its parts together."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.recipe import RecipeError, load_recipe
from pipelines.batch import ViewBatch
from pipelines.views import PLANS
from tests.trainers.small_runs import check_ranks_and_micro_batches, check_resumes, make_method
from trainers.heads import build_projector
from trainers.methods import BaseMethod
from trainers.methods.mvmr import Config
from trainers.parts.representations import NAMES

HEADS = {"projector": {"hidden": 32, "output": 16}}
SOME = {"pixels": 0.7, "scattering": 0.2, "augmented_pixels": 0.4, "hog": 0.3, "local_std": 1.1}
ALL = dict.fromkeys(NAMES, 0.5) | {"patch_scattering": 0}  # of 8 pixels there are no 16 patches
WIDTHS = {"pixels": 11, "scattering": 5, "augmented_pixels": 11, "hog": 3, "local_std": 4}
N, D = 7, 6


def embeddings(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
    z[1] = z[0] + 0.5 * z[1]
    z[..., 0] *= 3  # a deviation above the margin
    found = {"features": z, "z": z}
    for name, width in WIDTHS.items():
        noise = torch.randn(N, width, generator=generator, dtype=torch.float64)
        found[name] = (noise + z[0, :, :1])[None]
    return {name: value.to(dtype) for name, value in found.items()}


def loss(settings: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
    return loss_of(digits_method(representations=SOME, **settings), given)


def loss_of(method: BaseMethod, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return method.loss(given, ViewBatch(torch.empty(2, 0), torch.empty(0), torch.empty(0)), None)


def digits_method(**settings: Any) -> BaseMethod:
    return make_method("mvmr", HEADS | settings)


def distances(rows: np.ndarray, floor: float = 0.0) -> np.ndarray:
    return np.array([[math.sqrt(max(((a - b) ** 2).sum(), floor)) for b in rows] for a in rows])


def bias_corrected(x: np.ndarray, z: np.ndarray) -> float:
    """R*², equations 2.1 to 2.4 of Székely & Rizzo 2014."""

    def u_centred(rows: np.ndarray) -> np.ndarray:
        a, n = distances(rows), len(rows)
        centred = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                if i != j:
                    of_pair = a[i].sum() / (n - 2) + a[:, j].sum() / (n - 2)
                    centred[i, j] = a[i, j] - of_pair + a.sum() / ((n - 1) * (n - 2))
        return centred

    a, b = u_centred(x), u_centred(z)
    return (a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum())


def of_v_statistics(x: np.ndarray, z: np.ndarray, floor: float = 0.0) -> float:
    """R of Székely, Rizzo & Bakirov 2007."""
    centred = []
    for rows in (x, z):
        a = distances(rows, floor)
        centred.append(a - a.mean(0) - a.mean(1)[:, None] + a.mean())
    a, b = centred
    return math.sqrt((a * b).mean()) / ((a * a).mean() * (b * b).mean()) ** 0.25


def as_published(x: np.ndarray, z: np.ndarray, name: str) -> float:
    scaled = name in ("views", "pixels", "scattering", "augmented_pixels")
    return of_v_statistics(x / 32 if scaled else x, z / 32, floor=1e-4)


@pytest.mark.parametrize("estimator", ["unbiased", "biased", "faithful"])
def test_every_term_is_its_formula(estimator):
    given = embeddings()
    settings: dict[str, Any] = {"weights": {"mse": 0.3, "std": 2.0, "views": 0.6}, "std_margin": 1.5}
    settings |= {"faithful": True} if estimator == "faithful" else {"estimator": estimator}
    found = loss(settings, given)

    plain, augmented = given["z"].numpy()
    terms = {"mse": ((plain - augmented) ** 2).sum() / (N * D)}
    deviations = []
    for rows in (plain, augmented):
        mean = rows.sum(0) / N
        deviations.append(np.sqrt(((rows - mean) ** 2).sum(0) / (N - 1) + 1e-4))
    terms["std_hinge"] = sum(max(0, 1.5 - deviation) for view in deviations for deviation in view) / D
    terms["embedding_std"] = np.mean(deviations)
    assert any(deviation > 1.5 for deviation in deviations[0])
    expected = 0.3 * terms["mse"] + 2 * terms["std_hinge"]
    for name, weight in {"views": 0.6, **SOME}.items():
        x = plain if name == "views" else given[name][0].numpy()
        if estimator == "faithful":
            dependence = as_published(x, augmented, name)
        else:
            dependence = (bias_corrected if estimator == "unbiased" else of_v_statistics)(x, augmented)
        terms[f"dependence_{name}"] = dependence
        expected += weight * (dependence if estimator == "faithful" and name != "views" else 1 - dependence)
    assert found.keys() == {"loss", *terms}
    assert abs(found["loss"].item() - expected) < 1e-12
    for name, value in terms.items():
        assert abs(found[name].item() - value) < 1e-12, name
        assert not found[name].requires_grad


@pytest.mark.parametrize("settings", [{}, {"estimator": "biased"}, {"faithful": True}])
def test_gradient_of_both_views(settings):
    given, method = embeddings(), digits_method(representations=SOME | {"scattering": 0, "local_std": 0}, **settings)
    z = given["z"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss_of(method, given | {"z": z})["loss"], z)


@pytest.mark.parametrize("settings", [{}, {"estimator": "biased"}, {"faithful": True}])
@pytest.mark.parametrize("spread", [0.0, 1e-20])
def test_collapsed_embeddings_have_a_finite_gradient(settings, spread):
    given = embeddings(torch.float32)
    z = (2 + spread * given["z"]).requires_grad_()
    found = loss(settings, given | {"z": z})
    found["loss"].backward()
    assert found["loss"].isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_half_precision_embeddings_are_computed_in_float32():
    given = embeddings(torch.float32)
    given["z"] = given["z"].bfloat16()
    found = loss({}, given)
    exact = loss({}, {name: value.double() for name, value in given.items()})
    assert all(value.dtype == torch.float32 for value in found.values())
    assert all(abs(found[name] - exact[name]) < 1e-5 for name in found)


def test_representations_are_of_the_image_without_augmentation():
    views = torch.randn(2, 5, 3, 8, 8, dtype=torch.float64)
    batch = ViewBatch(views, torch.zeros(5), torch.arange(5))
    method = digits_method(representations=ALL)
    found = method.targets(batch)
    assert set(found) == set(NAMES) - {"patch_scattering"}
    assert torch.equal(found["pixels"], views[:1].flatten(2))
    other = ViewBatch(torch.stack([views[0], views[1] + 1]), batch.labels, batch.indices)
    assert all(torch.equal(found[name], value) for name, value in method.targets(other).items())
    assert set(digits_method().targets(batch)) == {"pixels", "scattering", "augmented_pixels", "hog", "local_std"}


def test_draws_go_on_with_the_steps_and_after_a_resume():
    batch = ViewBatch(torch.randn(2, 5, 3, 8, 8), torch.zeros(5), torch.arange(5))
    method = digits_method()
    first = method.targets(batch)
    assert torch.equal(method.targets(batch)["augmented_pixels"], first["augmented_pixels"])
    method.update({}, batch, None)
    second = method.targets(batch)
    assert torch.equal(second["hog"], first["hog"])
    assert not torch.equal(second["augmented_pixels"], first["augmented_pixels"])
    restored = digits_method()
    restored.load_state_dict(method.state_dict())
    assert torch.equal(restored.targets(batch)["augmented_pixels"], second["augmented_pixels"])


def test_faithful_changes_the_histograms():
    batch = ViewBatch(torch.randn(2, 5, 3, 8, 8), torch.zeros(5), torch.arange(5))
    ours, theirs = digits_method().targets(batch), digits_method(faithful=True).targets(batch)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == ["hog"]


def test_the_projector_is_the_papers():
    config = Config()
    with torch.device("meta"):
        layers = build_projector(config.projector, 2048)
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(2048, 8192), (8192, 8192), (8192, 8192)]
    assert all(layer.bias is None for layer in linear)
    assert [type(layer) for layer in layers][2:] == [nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert config.augmentation.model_dump() == PLANS["mvmr"][1].model_dump()
    weights = config.representations.model_dump()
    assert set(weights) == set(NAMES)
    assert {name for name, weight in weights.items() if weight == 1} == set(SOME)
    assert Config.model_validate({"projector": {"hidden": 64}}).projector.layers == 3


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["views.plan=simclr"], ["the image itself and an augmented view", "views.plan=mvmr"]),
        (["views.custom=[{}, {}]"], ["the image itself and an augmented view"]),
        (["views.custom=[{flip: 0.5}, {}]"], ["in this order"]),
        (["views.repeat=2"], ["4 views", "mvmr"]),
        (["batch_size=3"], ["batch_size=3", "at least 4"]),
        (["method.faithful=true", "method.estimator=unbiased"], ["faithful=true", "estimator=unbiased"]),
        (["method.representations.pixel=1"], ["pixel", "did you mean pixels?"]),
        (["method.representations.hog=-1"], ["hog", "greater than or equal to 0"]),
        (
            [f"method.{key}=0" for key in ("weights.mse", "weights.std", "weights.views")]
            + [f"method.representations.{name}=0" for name in SOME],
            ["no term"],
        ),
        (["method.representations.patch_scattering=1"], ["patch_scattering needs images of 16 pixels", "8"]),
        (["method.augmentation.blur_kernel=99"], ["method.augmentation.blur_kernel=99", "8 pixels", "at most 15"]),
    ],
)
def test_refusals(tmp_path, overrides, expected):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 20\nbatch_size: 64\nviews: {plan: mvmr, override: {blur: 0}}\nmethod: {name: mvmr}\n")
    load_recipe(path)
    if any(override.startswith("views.custom") for override in overrides):
        path.write_text("epochs: 20\nbatch_size: 64\nmethod: {name: mvmr}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    for part in expected:
        assert part in str(caught.value), str(caught.value)


def test_ranks_and_micro_batches_change_nothing():
    faithful = {"faithful": True, "representations": {"scattering": 0, "local_std": 0}}
    check_ranks_and_micro_batches("mvmr", [HEADS | {"representations": ALL}, HEADS | faithful])


def test_resumes_to_the_bit():
    check_resumes("mvmr", HEADS)
