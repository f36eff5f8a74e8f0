"""`python -m tools.export`: what another library loads gives the encoder's features, or nothing is written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from tools import export
from tools.exporting import to_onnx, to_pt2, to_torchscript, to_torchvision
from tools.exporting.job import load_job
from trainers.dropout import add_dropout, dropout_rate
from trainers.encoders import EncoderConfig, build_encoder
from trainers.engine import Ranks
from trainers.features import load_encoder, weights_hash
from trainers.state import RunState, save_checkpoint

MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]
GRAPHS = ["torchscript", "pt2", "onnx"]


def lived_in(arch: str, stem: str, size: int, dropout: float = 0) -> nn.Module:
    """An encoder whose BatchNorm does something: statistics and affine parameters away from 0 and 1."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(arch=arch, stem=stem), size)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    if dropout:
        add_dropout(encoder, dropout)
    return encoder.eval()


def save(encoder: nn.Module, path: Path, arch: str, stem: str, size: int, **more: Any) -> Path:
    about = {"arch": arch, "stem": stem, "image_size": size, "mean": MEAN, "std": STD, **more}
    save_file(encoder.state_dict(), path, metadata={"twinstream": json.dumps(about)})
    return path


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


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(export.app, [str(argument) for argument in arguments])


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


def metadata_of(path: Path) -> dict[str, Any]:
    """Read by each library's own means."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["twinstream"])
    if path.suffix == ".onnx":
        return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["twinstream"])
    extra = {"twinstream": ""}
    if path.suffix == ".pt2":
        torch.export.load(path, extra_files=extra)
    else:
        torch.jit.load(path, _extra_files=extra)
    return json.loads(extra["twinstream"])


# ---- the same features ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        *(("imagenet", to) for to in ("torchvision", "timm", "torchscript")),
        *(("small", to) for to in ("torchvision", "timm", "pt2")),
        *(("tiny", to) for to in GRAPHS),  # the guide's code has a ResNet-18 in all of them
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
    module, about = load_job(encoders["tiny"][1])
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for form, name in ((to_torchscript, "a.pt"), (to_pt2, "a.pt2")):
        job = export.Job(module, about, tmp_path / name)
        form.write(job, tmp_path / name)
        export.largest_deviation(job, form.read(job, tmp_path / name))
    assert not module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# ---- nothing half written, nothing lost -----------------------------------------------------------------


def test_a_file_that_differs_is_not_kept(
    tmp_path: Path, encoders: dict[str, tuple[nn.Module, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = encoders["small"][1]
    output = tmp_path / "a.safetensors"
    output.write_text("older")

    def spoil(job: export.Job, path: Path) -> None:
        tensors = dict(job.module.state_dict())
        tensors["layer4.1.bn2.bias"] = tensors["layer4.1.bn2.bias"] + 1e-2
        save_file(tensors, path)

    monkeypatch.setattr(to_torchvision, "write", spoil)
    done = call(weights, "--to", "torchvision", "--output", output, "--force")
    assert done.exit_code == 2
    assert re.search(r"error: the file's features are off by \S+ of the largest; at most 0.0001", done.stderr)
    assert output.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]

    def forget(job: export.Job, path: Path) -> None:
        save_file({name: value for name, value in job.module.state_dict().items() if name != "bn1.bias"}, path)

    monkeypatch.setattr(to_torchvision, "write", forget)
    done = call(weights, "--to", "torchvision", "--output", output, "--force")
    assert done.exit_code == 2
    assert "bn1.bias" in done.stderr
    assert output.read_text() == "older"


def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, encoders: dict[str, tuple[nn.Module, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(job: export.Job, path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(to_torchscript, "write", interrupted)
    done = call(encoders["tiny"][1], "--to", "torchscript", "--output", tmp_path / "a.pt")
    assert done.exit_code == 130
    assert "nothing was written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_older_files_are_overwritten_only_by_force(tmp_path: Path, encoders: dict[str, tuple[nn.Module, Path]]) -> None:
    weights, output = encoders["tiny"][1], tmp_path / "a.pt"
    output.write_text("older")
    done = call(weights, "--to", "torchscript", "--output", output)
    assert (done.exit_code, output.read_text()) == (2, "older")
    assert done.stderr == f"error: {output} is there already; choose another --output, or overwrite it with --force\n"
    assert call(weights, "--to", "torchscript", "--output", output, "--force").exit_code == 0
    assert metadata_of(output)["arch"] == "resnet8x4"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_not_exported(tmp_path: Path, value: float) -> None:
    encoder = lived_in("resnet8x4", "auto", 8)
    encoder.layer3[0].bn2.bias.data[0] = value
    weights = save(encoder, tmp_path / "w.safetensors", "resnet8x4", "auto", 8)
    done = call(weights, "--to", "torchscript")
    assert done.exit_code == 2
    assert "not finite" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name a run folder or weights, and --to one of torchvision"),
        (["tiny"], "--to one of torchvision"),
        (["tiny", "--to", "tensorflow"], "--to tensorflow is not known; choose torchvision, timm"),
        (["nowhere", "--to", "onnx"], "nowhere is neither a run folder nor"),
        ([".", "--to", "onnx"], "no recipe.yaml"),
        (["tiny", "--to", "torchvision"], "torchvision has no resnet8x4; --to torchscript, pt2 or onnx takes it"),
        (["tiny", "--to", "timm"], "timm has no resnet8x4"),
        (["tiny", "--to", "detectron2"], "detectron2 has no resnet8x4"),
        (["small", "--to", "detectron2"], "detectron2's ResNets have the ImageNet stem only"),
        (["tiny", "--to", "timm", "--with-normalisation"], "is for torchscript, pt2, onnx; --to timm holds weights"),
        (["tiny", "--to", "onnx", "--output", "a.pt"], "--output a.pt: expected a name that ends in .onnx"),
        (["tiny", "--to", "onnx", "--output", "no/a.onnx"], "no is not a folder that can be written to"),
        (["tiny", "--to", "torchscript", "--output", "folder.pt", "--force"], "folder.pt is there already"),
        (["small", "--to", "torchvision", "--output", "small", "--force"], "these are the weights to export"),
        (["bare.safetensors", "--to", "onnx"], "no 'twinstream' metadata"),
        (["broken.safetensors", "--to", "onnx"], "broken.safetensors cannot be read"),
    ],
)
def test_mistakes_end_in_one_readable_line(
    tmp_path: Path,
    encoders: dict[str, tuple[nn.Module, Path]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10")
    paths = {name: str(weights) for name, (_, weights) in encoders.items()}
    done = call(*(paths.get(argument, argument) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


def test_an_absent_library_is_named_with_its_extra(
    encoders: dict[str, tuple[nn.Module, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    done = call(encoders["tiny"][1], "--to", "onnx")
    assert done.exit_code == 2
    assert done.stderr == "error: --to onnx needs onnxscript: pip install 'twinstream[export]'\n"


# ---- the guide ------------------------------------------------------------------------------------------

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
