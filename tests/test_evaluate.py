"""``evaluate.py`` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from evaluate import app
from trainers.encoders import EncoderConfig, build_encoder


def evaluate(folder: Path, *arguments: str) -> Result:
    """In this process, from that folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return CliRunner().invoke(app, list(arguments))


def last_line(done: Result) -> dict[str, Any]:
    assert done.exit_code == 0, done.output
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return record


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported, untrained encoder."""
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(arch="resnet8x4"), 8)
    path = tmp_path_factory.mktemp("export") / "encoder.safetensors"
    about = {"arch": "resnet8x4", "stem": "auto", "image_size": 8, "mean": [0.3] * 3, "std": [0.4] * 3}
    save_file(encoder.state_dict(), path, metadata={"twinstream": json.dumps(about)})
    return path


def test_raw_pixels_get_what_scikit_learn_gets(tmp_path: Path) -> None:
    record = last_line(evaluate(tmp_path, "knn", "--baseline", "pixels", "--data", "digits", "k=[1, 20]"))
    assert (record["protocol"], record["metric"], record["n_test"]) == ("knn", "top1", 360)
    assert record["value"] == record["top1"]
    assert 95 < record["top1"] < 99.5
    assert record["top5"] >= record["top1"]
    linear = last_line(evaluate(tmp_path, "linear", "--baseline", "pixels", "--data", "digits", "labels=10-per-class"))
    assert 70 < linear["value"] < 95
    assert 0 < linear["standard_error"] < 6
    assert linear["labels"] == "10-per-class"
    index = next((tmp_path / "runs/evaluations/labels").glob("*-seed1.json"))
    again = last_line(evaluate(tmp_path, "linear", "--baseline", "pixels", "--data", "digits", f"labels={index}"))
    kept = list((tmp_path / "runs/evaluations").glob("linear-digits-10-per-class-*.json"))
    assert len(kept) == 1
    runs = json.loads(kept[0].read_text())["runs"]
    assert [run["labels"] for run in runs] == [100, 100, 100]
    assert again["value"] == runs[1]["top1"], "the kept index file stands for the subset it was written for"
    free = last_line(evaluate(tmp_path, "knn", "--baseline", "pixels", "--data", "digits", "data.holdout=0", "k=[3]"))
    assert "nothing being held out" in str(free["description"])
    subsets = sorted((tmp_path / "runs/evaluations/labels").glob("*.json"))
    assert len(subsets) == 3
    ids = [json.loads(path.read_text())["ids"] for path in subsets]
    assert len({tuple(i) for i in ids}) == 3


def test_exported_weights_and_the_comparison(tmp_path: Path, weights: Path) -> None:
    done = evaluate(tmp_path, "compare", str(weights), "--data", "digits", "seeds=2")
    record = last_line(done)
    assert record["protocol"] == "compare"
    for word in ("raw pixels", "random encoder", "kNN", "linear, 10 per class", "held-out"):
        assert word in done.stdout
    knn = last_line(evaluate(tmp_path, "knn", str(weights), "--data", "digits"))
    assert 80 < knn["value"] < 99, "even a random encoder tells digits apart"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["knn"], "name a run folder or weights"),
        (["knn", "nowhere"], "neither a run folder nor"),
        (["knn", "."], "no recipe.yaml"),
        (["knn", "--baseline", "noise", "--data", "digits"], "choose pixels or random"),
        (["knn", "--baseline", "pixels"], "--data is needed"),
        (["knn", "--baseline", "pixels", "--data", "digit"], "digits"),
        (["linear", "--baseline", "pixels", "--data", "digits", "lables=1%"], "did you mean labels?"),
        (["linear", "--baseline", "pixels", "--data", "digits", "labels=some"], "budget 'some'"),
        (["linear", "--baseline", "pixels", "--data", "digits", "labels=500-per-class"], "500"),
        (["linear", "--baseline", "pixels", "--data", "digits", "data.holdout=0"], "data.holdout"),
        (["knn", "--baseline", "pixels", "--data", "digits", "k=[0]"], "k.0=0"),
        (["knn", "--baseline", "pixels", "--data", "digits", "k=[]"], "k=[]"),
        (["knn", "--baseline", "pixels", "--data", "digits", "device=cuda"], "no CUDA device"),
        (["knn", "--baseline", "random", "--data", "digits", "encoder.arch=resnet9"], "did you mean"),
        (["knn", "--baseline", "pixels", "--data", "digits", "encoder.arch=resnet18"], "raw pixels have none"),
        (["compare", "--baseline", "random", "--data", "digits"], "compare has both baselines in its table"),
    ],
)
def test_mistakes_end_in_one_readable_message(tmp_path: Path, arguments: list[str], expected: str) -> None:
    done = evaluate(tmp_path, *arguments)
    assert done.exit_code == 2, done.output
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(("protocol", "settings"), [("knn", ["k=[5, 20]"]), ("compare", ["seeds=2"])])
def test_two_processes_find_what_one_does(tmp_path: Path, weights: Path, protocol: str, settings: list[str]) -> None:
    """Each extracts its share of the features and classifies its share of the queries."""
    arguments = [protocol, str(weights), "--data", "digits", *settings]
    alone = last_line(evaluate(tmp_path, *arguments))
    for path in (weights.parent / "evaluations/features").glob("*"):
        path.unlink()
    script = str(Path(__file__).parents[1] / "evaluate.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *arguments]
    done = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == alone
    assert done.stdout.count('"protocol"') == 1, "one process speaks"
    kept = sorted(path.name for path in (weights.parent / "evaluations/features").iterdir())
    assert len(kept) >= 3
    assert all(name.endswith(".safetensors") for name in kept), "the shares are put together and removed"


@pytest.mark.parametrize("protocol", ["knn", "linear", "compare", "uncertainty"])
def test_weights_of_a_run_that_diverged_are_refused(tmp_path: Path, weights: Path, protocol: str) -> None:
    tensors = load_file(weights)
    tensors["layer2.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    tensors["bn1.running_mean"][0] = torch.nan
    with safe_open(weights, "pt") as file:
        save_file(tensors, tmp_path / "diverged.safetensors", metadata=file.metadata())
    done = evaluate(tmp_path, protocol, "diverged.safetensors", "--data", "digits")
    assert done.exit_code == 2, done.output
    assert "its features of digits are not all finite; the run diverged" in done.stderr


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, weights: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file({"conv1.weight": torch.zeros(1)}, bare)
    done = evaluate(tmp_path, "knn", str(bare), "--data", "digits")
    assert done.exit_code == 2
    assert "does not say which architecture" in done.stderr
    wrong = tmp_path / "wrong.safetensors"
    about = {"arch": "resnet8x4", "stem": "auto", "image_size": 8, "mean": [0.3] * 3, "std": [0.4] * 3}
    save_file({"conv1.weight": torch.zeros(1)}, wrong, metadata={"twinstream": json.dumps(about)})
    done = evaluate(tmp_path, "knn", str(wrong), "--data", "digits")
    assert done.exit_code == 2
    assert "missing bn1.bias" in done.stderr
    assert "conv1.weight is [1], expected [32, 3, 3, 3]" in done.stderr
    for metadata in ("{", "{}", '{"arch": "vgg", "stem": "auto", "image_size": 8, "mean": [0], "std": [1]}'):
        save_file({"conv1.weight": torch.zeros(1)}, wrong, metadata={"twinstream": metadata})
        done = evaluate(tmp_path, "knn", str(wrong), "--data", "digits")
        assert "metadata is damaged" in done.stderr
    wrong.write_bytes(wrong.read_bytes()[:50])
    assert "cannot be read" in evaluate(tmp_path, "knn", str(wrong), "--data", "digits").stderr
    assert "for --baseline" in evaluate(tmp_path, "knn", str(weights), "--data", "digits", "size=16").stderr
