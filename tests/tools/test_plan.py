"""`python -m tools.plan`: what it says is sent, against what real ranks send; its sums by hand; the guide; refusals."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner, Result

from configs.recipe import read_recipe
from kernels import ntxent
from tests.distributed import run_ranks
from tests.tools.plan_ranks import planned, sent, sent_by_triton
from tests.trainers.parts.tiny_clip import write_teacher
from tools import plan
from tools.planning.estimate import Cluster, estimate
from tools.planning.methods import _dependence, loss_cost
from tools.planning.model import Model, model_of
from tools.planning.rates import Rate
from tools.planning.transfers import EXCHANGE, GATHER, REDUCE, SCALARS, Share, Transfer

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "operations" / "plan.md"
RECIPE = """
epochs: 3
batch_size: 32
data: {source: digits, limit: 128}
views: {plan: digits, size: 8}
encoder: {arch: resnet8x4}
method: {name: simclr, temperature: 0.2, projector: {hidden: 32, output: 16}}
optim: {name: sgd, lr: 0.1}
schedule: {warmup_epochs: 1}
"""
HEAD: dict[str, Any] = {"projector": {"hidden": 32, "output": 16}}
PREDICTED: dict[str, Any] = HEAD | {"predictor": {"hidden": 24}}
SCORED: dict[str, Any] = HEAD | {"subnetworks": {"count": 5, "widths": [4, 1]}}
ODD: dict[str, Any] = {"projector": {"hidden": 32, "output": 15}}  # which two ranks cannot share evenly
FEW: dict[str, Any] = {"representations": {"scattering": 0, "augmented_pixels": 0, "local_std": 0}}

QUICK: dict[str, dict[str, Any]] = {
    "simclr, MINE": {"name": "simclr", "settings": HEAD, "mine": True},
    "simclr, micro-batches": {"name": "simclr", "settings": HEAD, "engine": {"accumulation": 2, "clipping": 0.1}},
    "avgsimclr": {"name": "avgsimclr", "settings": HEAD, "views": 4},
    "beclr": {"name": "beclr", "settings": SCORED | {"soft_share": 1.0}},
    "nnclr": {"name": "nnclr", "settings": PREDICTED | {"queue_size": 40}},
    "kmclr": {"name": "kmclr", "settings": PREDICTED | {"centres": 20}},
    "probsimclr": {"name": "probsimclr", "settings": HEAD},
    "mvmr": {"name": "mvmr", "settings": ODD | FEW},
    "clipdistill": {"name": "clipdistill", "settings": ODD | {"cache_gb": 0}},
}
MORE: dict[str, dict[str, Any]] = {
    "simclr, local BatchNorm": {"name": "simclr", "settings": HEAD, "engine": {"batchnorm": "local"}},
    "simclr, ZeRO 2": {"name": "simclr", "settings": HEAD, "engine": {"zero_stage": 2, "accumulation": 2}},
    "simclr, ZeRO 1": {"name": "simclr", "settings": HEAD, "engine": {"zero_stage": 1}},
    "simclr, student_t": {"name": "simclr", "settings": HEAD | {"similarity": "student_t"}},
    "avgsimclr, all pairs": {"name": "avgsimclr", "settings": HEAD | {"pairing": "all_pairs"}, "views": 4},
    "avgsimclr, shared": {"name": "avgsimclr", "settings": HEAD | {"pairing": "shared"}, "views": 4},
    "beclr, hard": {
        "name": "beclr",
        "settings": SCORED | {"soft_share": 0.0, "usage_weight": 0, "ntxent_weight": 0},
    },
    "beclr, margin": {"name": "beclr", "settings": SCORED | {"soft_share": 1.0, "loss": "margin"}},
    "beclr, hard margin": {"name": "beclr", "settings": SCORED | {"soft_share": 0.0, "loss": "margin"}},
    "nnclr, both": {"name": "nnclr", "settings": PREDICTED | {"queue_size": 40, "enqueue": "both"}},
    "probsimclr, ntxent": {"name": "probsimclr", "settings": HEAD | {"loss": "ntxent"}},
    "mvmr, all": {"name": "mvmr", "settings": ODD},
    "mvmr, biased": {"name": "mvmr", "settings": ODD | FEW | {"estimator": "biased"}},
    "mvmr, faithful": {"name": "mvmr", "settings": ODD | FEW | {"faithful": True}},
    "clipdistill, supervised": {"name": "clipdistill", "settings": {"mode": "supervised", "cache_gb": 0}},
}


def with_teacher(cases: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    teacher = {"teacher": write_teacher(folder), "pretrained": None}
    return {
        name: case | {"settings": case["settings"] | teacher} if case["name"] == "clipdistill" else case
        for name, case in cases.items()
    }


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(plan.app, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


# ---- what is sent ---------------------------------------------------------------------------------------


def check_what_is_sent(cases: dict[str, dict[str, Any]], ranks: int) -> None:
    """Each collective of a step, how often and of how many bytes, on every rank."""
    for found in run_ranks(ranks, sent, cases, timeout=550):
        assert found.pop("exchanged") == found.pop("gathered")  # column sums, to the bit
        for name, case in cases.items():
            assert found[name] == planned(case, ranks), name


def test_the_plan_says_what_two_ranks_send(tmp_path: Path) -> None:
    check_what_is_sent(with_teacher(QUICK, tmp_path), 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_plan_says_what_ranks_send_with_every_setting(tmp_path: Path, ranks: int) -> None:
    check_what_is_sent(with_teacher(MORE if ranks == 2 else QUICK | MORE, tmp_path), ranks)


def one_rank_of(name: str, ranks: int, device: str = "cpu", half: bool = False, images: int = 12, **config: Any) -> Any:
    from trainers.methods import find_method

    settings = find_method(name).Config.model_validate({"name": name, **config})
    model = Model(settings, 2, 1, False, 0, (), 0, (), 8, {"z": 16, "scores": 5}, 0, 0.0, 0.0, 0.0)
    return loss_cost(Share(ranks, images, device, half), model)


@pytest.mark.slow
def test_the_plan_says_what_the_kernels_of_gpus_send() -> None:
    pytest.importorskip("triton")
    [found, _] = run_ranks(2, sent_by_triton, timeout=400)
    for name, half in (("ntxent half", True), ("ntxent float", False)):
        expected = [(t.collective, t.size) for t in one_rank_of("simclr", 2, "cuda", half).transfers[:4]]
        assert found[name] == expected, name
    of_scores = one_rank_of("beclr", 2, "cuda", True, soft_share=1.0, usage_weight=0, ntxent_weight=0).transfers[4:]
    expected_sizes = sorted((t.collective, t.size) for t in of_scores for _ in range(t.times))
    assert sorted(found["bregman"]) == expected_sizes
    of_distances = _dependence(Share(2, 12, "cuda", True), 7, (16,), "unbiased").transfers
    assert sorted(found["distance"]) == sorted((t.collective, t.size) for t in of_distances)


# ---- sums by hand ---------------------------------------------------------------------------------------


def test_bytes_of_a_ring() -> None:
    """Of 8 ranks on 2 nodes: gathering 800 bytes sends 7 parts of 100 on; a sum goes around twice."""
    assert Transfer(SCALARS, GATHER, 800).sent(8) == 700
    assert Transfer(SCALARS, REDUCE, 800).sent(8) == 1400
    assert Transfer(SCALARS, REDUCE, 800, times=3).within(8, 4) == (4200, 4200)
    assert Transfer(SCALARS, REDUCE, 800).within(4, 4) == (1200, 0)
    # Pairwise, each of a node's 4 ranks sends 4 of its 8 parts of 100 to the other node.
    assert Transfer(SCALARS, EXCHANGE, 800).within(8, 4) == (700, 1600)


def test_a_loss_over_ranks_does_a_part_of_the_whole_losss_products() -> None:
    """W ranks together do what one does for the whole batch, and the counter counts on one as much as the plan says."""
    rows = torch.randn(2, 600, 16, requires_grad=True)  # more than the rows whose exponentials are kept
    with FlopCounterMode(display=False) as counter:
        ntxent(rows[0], rows[1], temperature=0.5).backward()
    alone = one_rank_of("simclr", 1, images=600)
    assert alone.flops == 3 * 2 * 1200 * 1200 * 16
    assert counter.get_total_flops() <= alone.flops  # products written into a buffer are not counted
    assert 4 * one_rank_of("simclr", 4, images=150).flops == alone.flops


def test_a_step_by_hand(recipe: Path) -> None:
    """2 images/s a rank; links of 1 kB/s inside nodes of 2 and 0.5 kB/s between them; 10 ms a collective."""
    given = {"images_per_second": 2.0, "network": 1e-6, "node_network": 5e-7, "latency": 1e4, "matmul_rate": 1e-6}
    rates = {name: Rate(value, "given") for name, value in given.items()}
    settings = read_recipe(recipe, ["engine.batchnorm=local"])
    model = model_of(settings, images=128, classes=0, size=8)
    cluster = Cluster(128, 2, "cpu", None, rates)
    two, four = (estimate(settings, model, cluster, ranks) for ranks in (2, 4))
    assert (two.nodes, four.nodes, four.steps_per_epoch, four.steps) == (1, 2, 4, 12)
    assert (two.seconds["encoder"], four.seconds["encoder"]) == (8, 4)
    for one, rate in ((two, 1e3), (four, 5e2)):
        sent = sum(one.sent.values())
        assert one.seconds["network"] == pytest.approx(sent / rate + 0.01 * one.calls)
        loss = 3 * 2 * (64 // one.share.ranks) * 64 * 16
        assert one.seconds["loss"] == pytest.approx(loss / 1e6)
        assert one.hours == pytest.approx(
            12 * sum(one.seconds[part] or 0 for part in ("encoder", "loss", "network")) / 3600
        )
    weights = 4 * model.parameters
    assert two.sent["gradients on weights"] == weights
    assert four.sent["gradients on weights"] == weights * 2 * 3 / 4
    slow = estimate(settings, model, Cluster(128, 2, "cpu", None, rates | {"loading": Rate(0.001, "given")}), 4)
    assert slow.step == slow.seconds["loading"] == 16 / 0.001


def test_a_resnet_50_computes_what_is_known_of_it() -> None:
    """4.09 G multiply-adds an image of 224 pixels forward (torchvision's table), 25.6 M weights with its classifier."""
    settings = read_recipe(ROOT / "configs/imagenet/resnet50_100ep.yaml")
    model = model_of(settings, images=1_281_167, classes=1000, size=224)
    heads = 2048 * 2048 + 2048 * 128
    assert model.forward_flops / 2 / 2 == pytest.approx(4.09e9 + heads, rel=0.002)
    first_layer = 64 * 3 * 49 * 112 * 112  # no gradient of the image is computed
    assert model.step_flops == 3 * model.forward_flops - 2 * 2 * first_layer
    assert model.parameters == 25_557_032 - (2048 * 1000 + 1000) + heads + 2 * (2048 + 128)
    assert len(model.norms) == 53 + 2


# ---- the command ----------------------------------------------------------------------------------------


def test_the_command_asks_for_what_it_does_not_know(recipe: Path, tmp_path: Path) -> None:
    bare = call(recipe, "--ranks", "1,2")
    assert bare.exit_code == 0
    assert re.search(r"^\| 2 .* \? \|$", bare.output, re.MULTILINE)
    assert "Not given: --images-per-second" in bare.output
    assert "cannot be said" in bare.output
    written = tmp_path / "plan.json"
    rates = ["--images-per-second", "100,200", "--matmul-rate", 1, "--network", 1, "--node-network", 1]
    full = call(recipe, "--ranks", "1,2,16", "--ranks-per-node", 2, "--image-bytes", 5000, *rates, "--json", written)
    assert full.exit_code == 0
    assert "?" not in full.output
    assert "images_per_second: 100 images/s (given)" in full.output
    assert "| 200 " in full.output
    content = json.loads(written.read_text())
    assert [one["ranks"] for one in content["plan"]] == [1, 2, 16]
    assert [one["ranks"] for one in content["doublings"]] == [1, 2, 4, 8, 16]
    again = call(recipe, "--ranks", "1,2,16", "--ranks-per-node", 2, "--rates", written)
    assert "images_per_second: 100 images/s (plan.json: given)" in again.output
    hours = re.compile(r"^\| 16 .*$", re.MULTILINE)
    assert hours.findall(again.output) == hours.findall(full.output)[:1]


def test_rates_are_measured_on_the_spot(recipe: Path) -> None:
    found = call(recipe, "--ranks", "4", "--device", "cpu", "--measure")
    assert found.exit_code == 0
    rates = re.findall(r"^(\w+): ([0-9.]+) \S+ \(measured here", found.output, re.MULTILINE)
    assert [name for name, _ in rates] == ["images_per_second", "matmul_rate"]
    assert all(float(value) > 0 for _, value in rates)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ranks", "8,x"], "--ranks '8,x': expected whole numbers"),
        (["--ranks", "0"], "--ranks '0': expected whole numbers above 0"),
        (["--ranks", "99999999"], "at most 1,048,576"),
        (["--ranks", "5"], "batch_size=32 cannot be divided over 5 ranks"),
        (["--ranks", "2", "--batch-per-rank", "1000"], "a batch of 2,000 is larger than the"),
        (["--images", "nan"], "--images nan: expected a number from 1 to 1e12"),
        (["--ranks", "1", "--network", "-3"], "--network is -3, expected a finite number above 0"),
        (["--ranks", "1", "--images-per-second", "fast"], "--images-per-second 'fast': expected numbers"),
        (["--ranks", "1", "--image-bytes", "0"], "--image-bytes is 0"),
        (["--rates", "nowhere.json"], "--rates nowhere.json cannot be read"),
        (["data.source=imagenet", "data.root=nowhere"], "to plan without the images, give --images and --classes"),
        (["method.name=simclip"], "did you mean simclr?"),
    ],
)
def test_what_cannot_be_planned_is_refused(recipe: Path, arguments: list[str], expected: str) -> None:
    found = call(recipe, *arguments)
    assert found.exit_code == 2
    assert found.output.startswith("error: ")
    assert expected in found.output


def test_files_of_rates_that_are_none_are_refused(recipe: Path, tmp_path: Path) -> None:
    rates = tmp_path / "rates.json"
    for text in (
        "",
        "[]",
        "{}",
        '{"rates": [1]}',
        '{"rates": {"network": 3}}',
        '{"rates": {"speed": {"value": 1, "source": ""}}}',
    ):
        rates.write_text(text)
        found = call(recipe, "--ranks", "1", "--rates", rates)
        assert (found.exit_code, found.output.startswith("error: --rates")) == (2, True), text


# ---- the guide, the benchmark ---------------------------------------------------------------------------


def commands_of_the_guide() -> list[tuple[str, str]]:
    """Each command of the guide whose output stands below it, and that output."""
    blocks = re.findall(
        r"```sh\npython -m tools\.plan ([^`]*?)\n```\n\n```text\n(.*?)\n```", GUIDE.read_text(), re.DOTALL
    )
    return [(command.replace("\\\n", " "), output) for command, output in blocks]


COMMANDS = 5
LARGE = 4  # MV-MR's, whose projector alone has 150 million weights


def test_all_commands_of_the_guide_are_found() -> None:
    assert len(commands_of_the_guide()) == COMMANDS


@pytest.mark.parametrize(
    "number", [pytest.param(n, marks=[pytest.mark.slow] if n == LARGE else []) for n in range(COMMANDS)]
)
def test_the_guide_holds_what_the_command_prints(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.chdir(ROOT)
    command, output = commands_of_the_guide()[number]
    found = call(*shlex.split(command))
    assert found.exit_code == 0, found.output
    assert found.output.strip() == output.strip()


@pytest.mark.slow
def test_the_benchmark_of_scaling_runs_to_its_table(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    options = ["--batch-per-rank", "8", "--steps", "2", "--rounds", "1", "--json", str(results)]
    command = [sys.executable, "benchmarks/scaling.py", "configs/quickstart.yaml", "views.size=8", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "efficiency" in done.stdout
    found = json.loads(results.read_text())
    assert [row["processes"] for row in found["rows"]] == [1, 2, 2]
    assert found["rows"][2]["collectives"] > 30  # BatchNorm's alone are more
    assert all(row["images_per_second"] > 0 for row in found["rows"])
    planned_with = call(ROOT / "configs/quickstart.yaml", "--ranks", "1", "--device", "cpu", "--rates", results)
    assert planned_with.exit_code == 0
