"""``evaluate.py finetune`` from its inside: starts, seeds, shuffled labels, divergence."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainers.protocols.finetune as protocol
from pipelines.labelled import LabelledViews
from pipelines.sources import DataConfig, DataError, Source
from tests.trainers.test_finetune import CROP, Small, digits, same, small_classifier, state_of, views_of
from trainers.encoders import EncoderConfig
from trainers.features import FrozenEncoder
from trainers.finetune import (
    Classifier,
    FinetuneConfig,
    Fit,
    fit,
    predict,
)
from trainers.protocols import Job

CPU = torch.device("cpu")


def frozen(module: nn.Module, folder: Path, identity: str = "trained") -> FrozenEncoder:
    third = (0.3,) * 3
    config = EncoderConfig(arch="resnet8x4")
    return FrozenEncoder("made", module, 8, third, third, identity, folder, config, DataConfig())


def job_of(encoder: FrozenEncoder, **settings: Any) -> Job[protocol.Settings]:
    return Job(encoder, protocol.Settings(**settings), DataConfig(), CPU)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """An encoder whose features tell digits apart, from a few supervised epochs on 600 of them."""
    torch.manual_seed(0)
    module = Small()
    views = views_of(replace(digits("60-per-class"), mean=(0.3,) * 3, std=(0.3,) * 3), batch_size=64)
    assert fit(Classifier(module, 10), views, FinetuneConfig(), lr_body=0.05, lr_head=0.05, epochs=15) is not None
    return module.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From scratch, the protocol builds the small network as well."""
    monkeypatch.setattr(protocol, "build_encoder", lambda config, size: Small())


def test_the_pretrained_start_wins_and_the_encoder_stays(
    trained: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def looked(model: nn.Module, source: Source, *arguments: Any) -> Tensor:
        looks.append(source.split)
        logits = predict(model, source, *arguments)
        assert not any(module.training for module in model.modules())
        return logits

    def fitted(*arguments: Any, **settings: Any) -> Fit | None:
        looks.append("fit")
        return fit(*arguments, **settings)

    monkeypatch.setattr(protocol, "predict", looked)
    monkeypatch.setattr(protocol, "fit", fitted)
    before, flags = state_of(trained), [p.requires_grad for p in trained.parameters()]
    job = job_of(frozen(trained, tmp_path), labels="3-per-class", seeds=2, epochs=4, lr_body=(0.02, 0.001))
    result = protocol.score(job)
    assert same(before, state_of(trained))
    assert flags == [p.requires_grad for p in trained.parameters()]
    assert not trained.training
    assert looks == ["fit", "fit", "test"] * 4, "two starts of two draws, two learning rates each; test once a run"
    assert result.n_test == 360
    assert result.value > 80
    assert result.scores["scratch_top1"] is not None
    assert result.value > result.scores["scratch_top1"] + 20
    assert result.scores["gain_over_scratch"] == pytest.approx(result.value - result.scores["scratch_top1"])
    rows = [(row["start"], row["labels"]) for row in result.table]
    assert rows == [(start, label) for start in ("pretrained", "scratch") for label in ("30", "30", "mean")]
    for runs in (result.details["runs"], result.details["scratch"]["runs"]):
        assert [run["labels"] for run in runs] == [30, 30]
        assert [run["seed"] for run in runs] == [0, 1]
        for run in runs:
            tried = {fit["lr_body"]: fit["held_out_top1"] for fit in run["tried"]}
            assert tried[run["lr_body"]] == max(tried.values())
            assert run["held_out_top1"] == tried[run["lr_body"]]


def test_one_seed_is_one_result_and_another_is_another(trained: nn.Module, tmp_path: Path) -> None:
    def outcome(seed: int) -> tuple[Any, ...]:
        torch.rand(seed + 3)  # what was drawn before does not matter
        settings: dict[str, Any] = {"labels": "2-per-class", "seeds": 1, "epochs": 2, "head": "normal"}
        result = protocol.score(job_of(frozen(trained, tmp_path), seed=seed, **settings))
        details = result.details
        return result.value, result.scores, details["runs"], details["scratch"]["runs"], details["confusion"]

    state = torch.get_rng_state()
    first = outcome(0)
    torch.set_rng_state(state)
    assert outcome(0) == first
    assert outcome(1) != first


def test_shuffled_labels_give_chance(trained: nn.Module) -> None:
    source, test = digits("20-per-class"), digits(split="test")
    shuffled = replace(source, labels=source.labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))])
    right = {}
    for name, images in (("true", source), ("shuffled", shuffled)):
        model = Classifier(copy.deepcopy(trained), 10)
        found = fit(model, views_of(images), FinetuneConfig(), lr_body=0.02, lr_head=0.02, epochs=3)
        assert found is not None
        right[name] = 100 * (predict(model, test, 8, CPU).argmax(1) == test.labels).double().mean().item()
    assert right["true"] > 80
    assert right["shuffled"] < 25, "10 % and the scatter of 200 labels"


def test_starts_that_cannot_be_are_refused(trained: nn.Module, tmp_path: Path) -> None:
    pixels = replace(frozen(trained, tmp_path), module=None)
    with pytest.raises(DataError, match="raw pixels"):
        protocol.score(job_of(pixels))
    untrained = frozen(trained, tmp_path, identity="random-resnet8x4-auto-8-0")
    with pytest.raises(DataError, match="initial=pretrained"):
        protocol.score(job_of(untrained, initial="pretrained"))
    foreign = replace(frozen(trained, tmp_path), config=None)
    with pytest.raises(DataError, match="set initial=pretrained"):
        protocol.score(job_of(foreign))


def test_divergence_everywhere_is_an_error_and_elsewhere_a_loser(trained: nn.Module, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"labels": "3-per-class", "seeds": 1, "epochs": 3, "initial": "pretrained"}
    with pytest.raises(DataError, match=r"diverged \(pretrained\).*1e\+38"):
        protocol.score(job_of(frozen(trained, tmp_path), **settings, lr_head=(1e38,)))
    result = protocol.score(job_of(frozen(trained, tmp_path), **settings, lr_head=(1e38, 0.05)))
    (run,) = result.details["runs"]
    assert run["lr_head"] == 0.05
    assert [fit["diverged"] for fit in run["tried"]] == [True, False]


@pytest.mark.gpu
def test_a_gpu_trains_in_bfloat16(tmp_path: Path) -> None:
    cuda = torch.device("cuda")
    views = LabelledViews(digits(), CROP, size=8, batch_size=16, seed=0, device=cuda)
    found = fit(small_classifier(), views, FinetuneConfig(), lr_body=0.05, lr_head=0.05, epochs=2)
    assert found is not None
    assert {value.device.type for value in found.state.values()} == {"cuda"}
    assert found.history[1]["loss"] < found.history[0]["loss"]
