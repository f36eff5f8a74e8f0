"""Checkpoints, weights and logs of strangers: they load as tensors and numbers, or one line says why not."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pipelines.sources import DataError
from tests.fuzz.test_bad_packed import places_in, readable
from tests.fuzz.test_bad_recipes import VALUES
from tests.fuzz.trials import trials, try_all, try_mutations, with_memory
from tests.trainers.run_folders import write_run
from trainers.engine import Ranks
from trainers.features import _cached, load_encoder
from trainers.runlog import _readable_rows
from trainers.state import CheckpointError, damage, find_checkpoint, load_checkpoint
from trainers.whole import load_method

RANKS = Ranks(0, 1, torch.device("cpu"), None, None)
METHOD = {"name": "simclr", "projector": {"hidden": 16, "output": 8}}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    write_run(run, METHOD)
    return run


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "run", symlinks=True))


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def seal(checkpoint: Path) -> None:
    """The checksums made again, as a stranger would."""
    names = sorted(path.name for path in checkpoint.iterdir() if path.name != "manifest.json")
    sums = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
    (checkpoint / "manifest.json").write_text(json.dumps(sums))


def refused(action: Callable[[], object]) -> bool:
    try:
        action()
    except (CheckpointError, DataError) as error:
        readable(error)
        return True
    return False


@trials(quick=60, many=4_000)
def test_a_mutated_checkpoint_is_read_or_refused(count: int, run: Path) -> None:
    checkpoint = find_checkpoint(run)
    assert checkpoint is not None
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != "manifest.json"}
    heads = {name: data[: 8 + struct.unpack("<Q", data[:8])[0]] for name, data in files.items() if "safe" in name}
    parts = [json.dumps([name]).encode() + b"\n" + heads.get(name, data) for name, data in files.items()]

    def check(data: bytes) -> object:
        for name, whole in files.items():  # what is not hit stays; of tensors the header is what is mutated
            (checkpoint / name).write_bytes(whole)
        first, _, rest = data.partition(b"\n")
        name = next((name for name in files if name.encode() in first), "state.json")
        tail = files[name][len(heads[name]) :] if name in heads else b""
        (checkpoint / name).write_bytes(rest + tail)
        seal(checkpoint)
        bad = refused(lambda: load_checkpoint(checkpoint, RANKS))
        bad |= refused(lambda: load_encoder(run))
        bad |= refused(lambda: load_method(run))
        return None if bad else data

    try_mutations(check, parts, count)


@trials(quick=25, many=2_000)
def test_any_value_may_be_in_the_state(count: int, run: Path) -> None:
    checkpoint = find_checkpoint(run)
    assert checkpoint is not None
    content = json.loads((checkpoint / "state.json").read_text())
    places = [place for place in places_in(content) if place[0] != "recipe"]

    def check(change: tuple[tuple[Any, ...], Any]) -> None:
        changed = json.loads(json.dumps(content))
        section, ((*above, last), value) = changed, change
        for key in above:
            section = section[key]
        section[last] = value
        (checkpoint / "state.json").write_text(json.dumps(changed, default=str))
        seal(checkpoint)
        refused(lambda: load_checkpoint(checkpoint, RANKS))
        refused(lambda: load_encoder(run))

    try_all(check, st.tuples(st.sampled_from(places), VALUES), count)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("world_size", 10**12, "world_size is not a number"),
        ("sharded", ["../../elsewhere"], "sharded is not a list of names"),
        ("step", -1, "step is not"),
        (
            "encoder",
            {"arch": "resnet8x4", "stem": "auto", "image_size": 10**9, "mean": [0] * 3, "std": [1] * 3},
            "16,384",
        ),
        ("encoder", {"arch": "resnet8x4", "stem": "auto", "image_size": 8, "mean": [0] * 3, "std": [0] * 3}, "std"),
        ("encoder", None, "damaged"),
    ],
)
def test_a_state_that_would_harm_is_refused(key: str, value: Any, reason: str, run: Path) -> None:
    checkpoint = find_checkpoint(run)
    assert checkpoint is not None
    content = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**content, key: value}))
    seal(checkpoint)
    with pytest.raises(CheckpointError, match=reason):
        load_checkpoint(checkpoint, RANKS) if key != "encoder" else load_encoder(run)


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "deep", "list", "outside"])
def test_what_is_no_checkpoint_is_passed_over(kind: str, run: Path, tmp_path: Path) -> None:
    """A newer one that is damaged: the older one is found. Nothing is waited for, and no link leads on."""
    good = find_checkpoint(run)
    assert good is not None
    bad = run / "checkpoints" / "step-00000099"
    if kind == "loop":
        bad.symlink_to(bad)
    elif kind == "outside":
        bad.symlink_to("/")
    else:
        shutil.copytree(good, bad)
        manifest = bad / "manifest.json"
        manifest.unlink()
        if kind == "pipe":
            os.mkfifo(manifest)
        elif kind == "device":
            manifest.symlink_to("/dev/zero")
        else:
            manifest.write_text("[" * 100_000 if kind == "deep" else '["manifest.json"]')
    last = run / "checkpoints" / "last"
    last.unlink()
    last.symlink_to(last)  # only people follow it
    assert with_memory(400, lambda: find_checkpoint(run), seconds=60) == str(good)


def test_a_device_among_the_files_is_not_read(run: Path) -> None:
    checkpoint = find_checkpoint(run)
    assert checkpoint is not None
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        path = checkpoint / "x.safetensors"
        make(path)
        sums = json.loads((checkpoint / "manifest.json").read_text())
        (checkpoint / "manifest.json").write_text(json.dumps({**sums, path.name: "0"}))
        assert "regular file" in with_memory(400, lambda: damage(checkpoint), seconds=60)
        path.unlink()


# ---- weights -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(pristine: Path) -> tuple[dict[str, torch.Tensor], str]:
    checkpoint = find_checkpoint(pristine)
    assert checkpoint is not None
    tensors = {
        name.removeprefix("encoder."): value
        for name, value in load_file(checkpoint / "method.safetensors").items()
        if name.startswith("encoder.")
    }
    return tensors, json.dumps(json.loads((checkpoint / "state.json").read_text())["encoder"])


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "weights.bin", "weights.safetensors"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_is_never_run(name: str, how: str, tmp_path: Path) -> None:
    path, trace = tmp_path / name, tmp_path / "it ran"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Harm(trace)))
    else:
        torch.save({"weight": torch.ones(2), "more": Harm(trace)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(path)
    readable(caught.value)
    assert "safetensors" in str(caught.value)
    assert not trace.exists()


@trials(quick=80, many=8_000)
def test_mutated_weights_are_read_or_refused(
    count: int, weights: tuple[dict[str, torch.Tensor], str], tmp_path: Path
) -> None:
    tensors, about = weights
    path = tmp_path / "encoder.safetensors"
    save_file(tensors, path, metadata={"twinstream": about})
    whole = path.read_bytes()
    head = whole[: 8 + struct.unpack("<Q", whole[:8])[0]]

    def check(data: bytes) -> object:
        path.write_bytes(data + whole[len(head) :])
        return None if refused(lambda: load_encoder(path)) else data

    assert try_mutations(check, [head], count) > 0


def test_weights_that_are_a_pipe_or_promise_terabytes_are_refused(tmp_path: Path) -> None:
    pipe, huge = tmp_path / "pipe.safetensors", tmp_path / "huge.safetensors"
    os.mkfifo(pipe)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    huge.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(huge, 8 + len(header) + (1 << 40))
    long = tmp_path / "long.safetensors"
    long.write_bytes(struct.pack("<Q", 2**63 - 1) + b"{}")
    for path in (pipe, huge, long):
        assert with_memory(600, lambda path=path: load_encoder(path), seconds=60).startswith("CheckpointError: ")


def test_a_damaged_cache_of_features_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for tensors in ({"features": torch.zeros(3)}, {"other": torch.zeros(3, 2)}, {"features": torch.zeros(2, 2)}):
        save_file(tensors, path)
        assert _cached(path, 3) is None
    path.write_bytes(pickle.dumps(Harm(tmp_path / "it ran")))
    assert _cached(path, 3) is None
    assert not (tmp_path / "it ran").exists()


@trials(quick=300, many=20_000)
def test_a_mutated_log_is_read_as_far_as_it_goes(count: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    seed = b"".join(json.dumps({"step": n, "epoch": n / 5, "loss": 1.5}).encode() + b"\n" for n in range(5))

    def check(data: bytes) -> object:
        path.write_bytes(data)
        rows = _readable_rows(path)
        assert all(type(json.loads(row)["step"]) is int for row in rows)
        return rows or None

    assert try_mutations(check, [seed, b'["step"]\n', b'{"step": null}\n', b"[" * 5_000], count) > 0
