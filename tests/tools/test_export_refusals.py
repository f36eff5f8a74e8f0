"""`python -m tools.export`: nothing half written, nothing lost, and mistakes in one readable line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tools.small_encoders import call, lived_in, metadata_of, save
from tools import export
from tools.exporting import to_torchscript, to_torchvision


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name."""
    folder = tmp_path_factory.mktemp("weights")
    kinds = {"tiny": ("resnet8x4", "auto", 8), "small": ("resnet18", "auto", 16)}
    return {name: save(lived_in(*kind), folder / f"{name}.safetensors", *kind) for name, kind in kinds.items()}


def test_a_file_that_differs_is_not_kept(
    tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "a.safetensors"
    output.write_text("older")

    def spoil(job: export.Job, path: Path) -> None:
        tensors = dict(job.module.state_dict())
        tensors["layer4.1.bn2.bias"] = tensors["layer4.1.bn2.bias"] + 1e-2
        save_file(tensors, path)

    monkeypatch.setattr(to_torchvision, "write", spoil)
    done = call(weights["small"], "--to", "torchvision", "--output", output, "--force")
    assert done.exit_code == 2
    assert re.search(
        r"a\.safetensors was not written: its features would be off by \S+ of the largest, and 0\.0001", done.stderr
    )
    assert output.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]

    def forget(job: export.Job, path: Path) -> None:
        save_file({name: value for name, value in job.module.state_dict().items() if name != "bn1.bias"}, path)

    monkeypatch.setattr(to_torchvision, "write", forget)
    done = call(weights["small"], "--to", "torchvision", "--output", output, "--force")
    assert done.exit_code == 2
    assert "bn1.bias" in done.stderr
    assert output.read_text() == "older"


def test_an_interrupted_export_leaves_nothing(
    tmp_path: Path, weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(job: export.Job, path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(to_torchscript, "write", interrupted)
    done = call(weights["tiny"], "--to", "torchscript", "--output", tmp_path / "a.pt")
    assert done.exit_code == 130
    assert "nothing was written" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_older_files_are_overwritten_only_by_force(tmp_path: Path, weights: dict[str, Path]) -> None:
    output = tmp_path / "a.pt"
    output.write_text("older")
    done = call(weights["tiny"], "--to", "torchscript", "--output", output)
    assert (done.exit_code, output.read_text()) == (2, "older")
    assert done.stderr == f"error: {output} is there already; choose another --output, or overwrite it with --force\n"
    assert call(weights["tiny"], "--to", "torchscript", "--output", output, "--force").exit_code == 0
    assert metadata_of(output)["arch"] == "resnet8x4"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_not_exported(tmp_path: Path, value: float) -> None:
    encoder = lived_in("resnet8x4", "auto", 8)
    encoder.layer3[0].bn2.bias.data[0] = value
    path = save(encoder, tmp_path / "w.safetensors", "resnet8x4", "auto", 8)
    done = call(path, "--to", "torchscript")
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
    weights: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.pt").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10")
    done = call(*(weights.get(argument, argument) for argument in arguments))
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert expected in done.stderr


def test_an_absent_library_is_named_with_its_extra(weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    find = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    done = call(weights["tiny"], "--to", "onnx")
    assert done.exit_code == 2
    assert done.stderr == "error: --to onnx needs onnxscript: pip install 'twinstream[export]'\n"
