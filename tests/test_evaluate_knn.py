"""``evaluate.py knn`` by BeCLR's divergence, as a user runs it."""

from pathlib import Path

import pytest
import torch

from pipelines.plain_views import plain_batches
from pipelines.sources import DataConfig, open_source
from pipelines.subsets import load_subset
from tests.test_evaluate import evaluate, last_line
from tests.trainers.run_folders import write_run

SMALL = {"projector": {"hidden": 32, "output": 16, "batchnorm": "all"}, "subnetworks": {"count": 24, "widths": [1]}}
CPU = torch.device("cpu")


def test_the_divergence_of_a_run_by_definition(tmp_path: Path) -> None:
    method = write_run(tmp_path / "beclr", {"name": "beclr", **SMALL})
    chosen = ("k=[20]", "temperature=[0.2]", "labels=10-per-class", "seeds=1", "similarity=bregman")
    record = last_line(evaluate(tmp_path, "knn", "beclr", *chosen))
    assert "Bregman divergence of BeCLR's subnetworks" in record["description"]
    assert "sigma 0.9" in record["description"]
    index = next((tmp_path / "beclr/evaluations/labels").glob("*-seed0.json"))
    again = last_line(evaluate(tmp_path, "knn", "beclr", *chosen[:2], f"labels={index}", "similarity=bregman"))
    assert again["top1"] == record["top1"]

    def scores(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        source = open_source(DataConfig(source="digits"), split)
        with torch.no_grad():
            rows = [method.embed(images[None])["scores"][0] for images, _ in plain_batches(source, 8, 256, CPU)]
        return torch.cat(rows), source.labels

    train = open_source(DataConfig(source="digits"), "train")
    (bank, labels), (queries, truth) = scores("train"), scores("test")
    few = load_subset(index, train)
    assert len(few) == 100
    assert len(bank[few].argmax(1).unique()) > 5, "many win"
    divergences = queries.amax(1, keepdim=True) - queries[:, bank[few].argmax(1)]
    limit = divergences.sort(dim=1).values[:, 19:20]
    nearer, tied = divergences < limit, divergences == limit
    share = nearer + tied * (20 - nearer.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    weights = share * torch.exp(torch.exp(-divergences / (2 * 0.9**2)) / 0.2)
    votes = torch.zeros(len(queries), 10).index_add_(1, labels[few], weights)
    right = votes.argmax(1) == truth
    assert 15 < record["top1"] < 80, "no chance, though nothing was trained"
    assert record["top1"] == pytest.approx(100 * right.double().mean().item(), abs=1e-9)


@pytest.mark.parametrize("target", [["simclr"], ["--baseline", "random", "--data", "digits"]])
def test_others_have_no_subnetworks(tmp_path: Path, target: list[str]) -> None:
    write_run(tmp_path / "simclr", {"name": "simclr", "projector": {"hidden": 16, "output": 8}})
    done = evaluate(tmp_path, "knn", *target, "similarity=bregman")
    assert done.exit_code == 2
    assert "similarity=bregman needs the subnetworks of a BeCLR run" in done.stderr
