"""`python -m tools.export`: what another library loads gives the encoder's features, or nothing is written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.tools.small_encoders import MEAN, STD, call, lived_in, metadata_of, save
from tools import export
from tools.exporting import to_onnx, to_pt2, to_torchscript
from tools.exporting.job import load_and_describe
from trainers.dropout import dropout_rate
from trainers.engine import Ranks
from trainers.features import load_encoder, weights_hash
from trainers.state import RunState, save_checkpoint

GRAPHS = ["torchscript", "pt2", "onnx"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """By name: the encoder and its weights."""
    folder = tmp_path_factory.mktemp("weights")
    kinds = {
        "tiny": ("resnet8x4", "auto", 8),
        "small": ("resnet18", "auto", 16),
        "imagenet": ("resnet18", "imagenet", 32),
    }
    found = {}
    for name, (arch, stem, size) in kinds.items():
        encoder = lived_in(arch, stem, size)
        found[name] = encoder, save(encoder, folder / f"{name}.safetensors", arch, stem, size)
    return found


def exported(*arguments: Any) -> str:
    """The line of code that the tool says loads what it wrote."""
    done = call(*arguments)
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 1
    return done.stdout.strip().partition("; load: ")[2]


def images_of(n: int, size: int, *, uniform: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    shape = (n, 3, size, size)
    return torch.rand(shape, generator=generator) if uniform else torch.randn(shape, generator=generator)


def run(code: str, images: Tensor) -> Tensor:
    """The features of whatever a line of loading code has made."""
    names: dict[str, Any] = {"images": images.numpy()}
    exec(code, names)
    with torch.no_grad():
        return torch.from_numpy(names["features"]) if "features" in names else names["model"](images)


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        *(("imagenet", to) for to in ("torchvision", "timm", "torchscript")),
        *(("small", to) for to in ("torchvision", "timm", "pt2")),
        ("tiny", "torchscript"),
        ("tiny", "pt2"),
        pytest.param("tiny", "onnx", marks=pytest.mark.slow),  # the guide's code and the graph's test have it quickly
    ],
)
def test_the_printed_line_loads_the_encoder(
    tmp_path: Path, encoders: dict[str, tuple[nn.Module, Path]], kind: str, to: str
) -> None:
    """Without a look at how the tool itself checks: other images, other numbers of them."""
    if to == "timm":
        pytest.importorskip("timm")
    encoder, weights = encoders[kind]
    before = weights.read_bytes()
    output = tmp_path / f"out{export.FORMATS[to].SUFFIX}"
    code = exported(weights, "--to", to, "--output", output)
    about = json.loads(safe_open(weights, "pt").metadata()["twinstream"])
    for n in (1, 7):
        images = images_of(n, about["image_size"])
        with torch.no_grad():
            expected = encoder(images)
        found = run(code, images)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert weights.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [output.name], "no drafts are left"
    assert output.stat().st_mode & 0o044 == 0o044 & ~umask(), "others can read it, where the umask lets them"
    said = metadata_of(output)
    assert (said["arch"], said["stem"]) == (about["arch"], "imagenet" if kind == "imagenet" else "small")
    assert (said["mean"], said["std"], said["image_size"]) == (MEAN, STD, about["image_size"])
    assert (said["format"], said["features"], said["normalisation_inside"]) == (to, expected.shape[1], False)
    assert said["weights"] == weights_hash(load_file(weights))
    assert (said["run"], said["step"]) == (None, None)
    assert said["load"] == code.replace(str(output), output.name)


def umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("to", GRAPHS)
def test_normalisation_is_in_the_graph_and_dropout_is_not(tmp_path: Path, to: str) -> None:
    encoder = lived_in("resnet8x4", "auto", 8, dropout=0.4)
    weights = save(encoder, tmp_path / "encoder.safetensors", "resnet8x4", "auto", 8, dropout=0.4)
    code = exported(weights, "--to", to, "--with-normalisation")
    images = images_of(3, 8, uniform=True)
    by_hand = torch.stack([(images[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    with torch.no_grad():
        expected = encoder(by_hand)
    found = run(code, images)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(run(code, images), found)
    said = metadata_of(tmp_path / f"encoder-{to}{export.FORMATS[to].SUFFIX}")
    assert (said["normalisation_inside"], said["dropout"]) == (True, 0.4)
    if to == "onnx":
        model = onnx.load(tmp_path / "encoder-onnx.onnx")
        assert [(one.domain, one.version) for one in model.opset_import] == [("", to_onnx.OPSET)]
        (taken,), (given,) = model.graph.input, model.graph.output
        assert (taken.name, given.name) == ("images", "features")
        shapes = [[d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in (taken, given)]
        assert shapes == [["batch", 3, 8, 8], ["batch", 256]]


def test_weights_for_torchvision_can_be_evaluated_and_exported_again(tmp_path: Path) -> None:
    """They keep the rate of dropout, the run and the step, and load_encoder reads them."""
    encoder = lived_in("resnet18", "auto", 16, dropout=0.3)
    weights = save(encoder, tmp_path / "w.safetensors", "resnet18", "auto", 16, dropout=0.3, run="simclr-1", step=12)
    exported(weights, "--to", "torchvision")
    loaded = load_encoder(tmp_path / "w-torchvision.safetensors")
    assert dropout_rate(loaded.module) == 0.3
    assert (loaded.mean, loaded.std, loaded.image_size) == (tuple(MEAN), tuple(STD), 16)
    images = images_of(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded.module.eval()(images), encoder(images))
    exported(tmp_path / "w-torchvision.safetensors", "--to", "torchscript", "--output", tmp_path / "again.pt")
    about = metadata_of(tmp_path / "again.pt")
    assert (about["run"], about["step"]) == ("simclr-1", 12)
    assert about["weights"] == weights_hash(load_file(weights))


def test_a_runs_newest_checkpoint_is_exported(tmp_path: Path) -> None:
    encoder = lived_in("resnet8x4", "auto", 8)
    folder = tmp_path / "simclr-abc"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("data: {source: digits}\n")
    ranks = Ranks(0, 1, torch.device("cpu"), None, None)
    about = {"arch": "resnet8x4", "stem": "auto", "image_size": 8, "mean": MEAN, "std": STD, "dropout": 0.0}
    for step, scale in ((20, 0.5), (40, 1.0)):
        tensors = {f"encoder.{name}": value * scale for name, value in encoder.state_dict().items()}
        tensors["projector.weight"] = torch.zeros(2)
        save_checkpoint(folder, RunState(step, {"method": tensors}, values={"encoder": about}), ranks, keep=3)
    code = exported(folder, "--to", "torchscript")
    assert (folder / "encoder-torchscript.pt").exists()
    said = metadata_of(folder / "encoder-torchscript.pt")
    assert (said["run"], said["step"]) == ("simclr-abc", 40)
    images = images_of(3, 8)
    with torch.no_grad():
        expected = lived_in("resnet8x4", "auto", 8)(images)
    assert (run(code, images) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_torchvision_misses_its_classifier_alone(tmp_path: Path, encoders: dict[str, tuple[nn.Module, Path]]) -> None:
    exported(encoders["imagenet"][1], "--to", "torchvision", "--output", tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    missing, unexpected = torchvision.models.resnet18().load_state_dict(tensors, strict=False)
    assert (sorted(missing), unexpected) == (["fc.bias", "fc.weight"], [])


def test_timm_takes_the_weights_for_another_number_of_classes(
    tmp_path: Path, encoders: dict[str, tuple[nn.Module, Path]]
) -> None:
    timm = pytest.importorskip("timm")
    encoder, weights = encoders["imagenet"]
    exported(weights, "--to", "timm", "--output", tmp_path / "a.safetensors")
    overlay = {"file": str(tmp_path / "a.safetensors"), "num_classes": 0, "mean": tuple(MEAN), "std": tuple(STD)}
    model = timm.create_model("resnet18", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10).eval()
    images = images_of(2, 32)
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        assert (features - encoder(images)).abs().max() <= 1e-5 * features.abs().max()
        assert model(images).shape == (2, 10)
    assert timm.data.resolve_model_data_config(model)["mean"] == tuple(MEAN)
    plain = {"file": str(tmp_path / "a.safetensors")}
    model = timm.create_model("resnet18", pretrained=True, pretrained_cfg_overlay=plain, num_classes=0).eval()
    with torch.no_grad():
        assert (model(images) - features).abs().max() <= 1e-5 * features.abs().max()


def test_exporting_leaves_the_encoder_as_it_was(tmp_path: Path, encoders: dict[str, tuple[nn.Module, Path]]) -> None:
    module, about = load_and_describe(encoders["tiny"][1])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for form, name in ((to_torchscript, "a.pt"), (to_pt2, "a.pt2")):
        job = export.Job(module, about, tmp_path / name)
        form.write(job, tmp_path / name)
        export.largest_deviation(job, form.read(job, tmp_path / name))
    assert not module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


GUIDE = Path(__file__).parents[2] / "docs" / "evaluation" / "export.md"


@pytest.mark.parametrize("to", ["torchvision", "timm", *GRAPHS])
def test_the_guides_code_runs(
    tmp_path: Path, encoders: dict[str, tuple[nn.Module, Path]], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """Each snippet finds the file of its format and makes ``features`` of ``images``."""
    if to == "timm":
        pytest.importorskip("timm")
    (code,) = re.findall(rf"### {to}\n.*?```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    encoder, weights = encoders["imagenet"]
    code = code.replace("resnet50", "resnet18")
    exported(weights, "--to", to, "--output", tmp_path / f"encoder-{to}{export.FORMATS[to].SUFFIX}")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": images_of(2, 32)}
    with torch.no_grad():
        exec(code, names)
        expected = encoder(names["images"])
    assert (torch.as_tensor(names["features"]) - expected).abs().max() <= 1e-5 * expected.abs().max()
