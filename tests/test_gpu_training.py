"""What benchmarks/gpu.py says of training: its figures against counts made by hand, on a CPU and in tiny."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
from benchmarks import gpu
from benchmarks.gpu_kernels import data_sheet_tflop_s, measure_limits, run_checks
from benchmarks.gpu_record import NO_TIME, Record
from benchmarks.gpu_step import BareStep, Shape, in_turns, plain_loss
from benchmarks.gpu_training import SMOKE, run_training
from tests.test_benchmarks import run

CPU = torch.device("cpu")
LIMITS = {"matmul_bf16_tflop_s": 2.0, "data_sheet_bf16_tflop_s": 4.0}


def record(path: Path, **options: float | str) -> Record:
    made = Record(path / "found.json", resumed=False, **options)  # type: ignore[arg-type]
    made.put("environment", {"seed": 0})
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    made = record(tmp_path_factory.mktemp("trained"))
    made.put("limits", LIMITS)
    run_training(made, CPU, SMOKE, (8,), smoke=True)
    rows = json.loads(made.path.read_text())["training"]
    assert rows == made.found["training"]
    return rows


def counted_by_hand(images: int) -> tuple[int, int]:
    """FLOPs of a step of resnet8x4 with two 8 x 8 views an image, and of its encoder.

    A convolution from a to b channels with k x k taps onto s x s places is 2 a b k² s² FLOPs, and as many twice more
    backward, but that the first has no gradient by the images.
    """

    def convolution(a: int, b: int, k: int, s: int) -> int:
        return 2 * a * b * k**2 * s**2

    first = convolution(3, 32, 3, 8)
    # Each stage: two 3 x 3 convolutions and the 1 x 1 one of the shortcut.
    stages = [(32, 64, 8), (64, 128, 4), (128, 256, 2)]
    inner = sum(convolution(a, b, 3, s) + convolution(b, b, 3, s) + convolution(a, b, 1, s) for a, b, s in stages)
    heads = 2 * (256 * 256 + 256 * 128)
    views = 2 * images
    encoder = views * (2 * first + 3 * inner)
    return encoder + views * 3 * heads + 6 * views**2 * 128, encoder


def test_figures_follow_from_the_milliseconds_and_from_flops_counted_by_hand(trained: list[dict]) -> None:
    steps = [row for row in trained if row.get("kind") == "step"]
    assert [(row["variant"], row["images"]) for row in steps] == [
        ("eager", 4), ("eager", 8), ("eager, plain NT-Xent", 4), ("compiled", 4), ("compiled", 8)
    ]  # fmt: skip
    for row in steps:
        flops, encoder = counted_by_hand(row["images"])
        assert (row["flops"], row["encoder_flops"]) == (flops, encoder)
        assert row["views"] == 2 * row["images"]
        assert row["images_per_second"] == pytest.approx(row["images"] / (row["ms"] / 1000))
        assert row["views_per_second"] == pytest.approx(2 * row["images_per_second"])
        assert row["over_encoder"] == pytest.approx((row["ms"] - row["encoder_ms"]) / row["encoder_ms"])
        assert row["mfu_of_measured"] == pytest.approx(flops / (row["ms"] / 1000) / 2e12)
        assert row["mfu_of_data_sheet"] == pytest.approx(row["mfu_of_measured"] / 2)
        assert row["peak_gb"] is None  # only a GPU's allocator counts


def test_the_parts_and_the_rest_make_up_the_step(trained: list[dict]) -> None:
    for variant in ("eager", "compiled"):
        parts = {row["part"]: row for row in trained if row.get("kind") == "part" and row["variant"] == variant}
        assert list(parts) == [
            "photometry", "encoder", "heads", "loss", "optimizer", "draws on the host", "rest"
        ]  # fmt: skip
        (step,) = {row["step_ms"] for row in parts.values()}
        assert sum(row["ms"] for name, row in parts.items() if name != "draws on the host") == pytest.approx(step)
        assert all(row["share"] == pytest.approx(row["ms"] / step) for row in parts.values())
        assert all(row["ms"] > 0 for name, row in parts.items() if name != "rest")


def test_what_a_cpu_cannot_do_is_a_row(trained: list[dict]) -> None:
    graphs = [row for row in trained if "CUDA graph" in row["variant"]]
    assert [row["missing"] for row in graphs] == ["a CUDA graph needs a CUDA device"] * 2
    losses = [row for row in trained if row.get("kind") == "loss"]
    assert [(row["rows"], row["matrix_mb"]) for row in losses] == [(8, 64 * 4 / 1e6), (16, 256 * 4 / 1e6)]


def test_a_bare_step_is_simclrs() -> None:
    """Against one written out in plain PyTorch, in bfloat16 both: loss, and the gradient that LARS is given."""
    step = BareStep(SMOKE, CPU)
    views = step.views()
    assert views.shape == (2, 4, 3, 8, 8)
    assert views.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    loss = step.loss(step.embed(views))
    (gradient,) = torch.autograd.grad(loss, [step.method.encoder.conv1.weight])
    with torch.autocast("cpu", torch.bfloat16):
        z = step.method.projector(step.method.encoder(views.reshape(8, 3, 8, 8)))
    z = nn.functional.normalize(z.double(), dim=1)
    logits = (z @ z.T / 0.1).fill_diagonal_(-math.inf)
    plain = nn.functional.cross_entropy(logits, torch.tensor([4, 5, 6, 7, 0, 1, 2, 3]))
    (expected,) = torch.autograd.grad(plain, [step.method.encoder.conv1.weight])
    assert loss.item() == pytest.approx(plain.item(), rel=1e-4)
    assert (gradient - expected).norm() < 0.02 * expected.norm()
    assert plain_loss()({"z": z.float().unflatten(0, (2, 4))}).item() == pytest.approx(plain.item(), rel=0.02)


def test_a_step_leaves_weights_and_no_gradients() -> None:
    """So that what is timed a hundred times stays the same work, and a graph can be captured."""
    step = BareStep(SMOKE, CPU)
    before = [p.detach().clone() for p in step.method.parameters()]
    step()
    for part in step.parts().values():
        part()
    assert all(map(torch.equal, before, step.method.parameters()))
    assert all(p.grad is None for p in step.method.parameters())
    assert len(step.optimizer.state) == len(before)  # every one was updated


def test_windows_are_timed_in_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: (time.sleep(0.001), order.append(name)) for name in "ab"}
    found = in_turns(calls, CPU, 0.0)
    assert order == ["a", "b", "a", "b", "a", "b"]  # warmed, counted, timed
    assert all(ms >= 1 for ms in found.values())


def test_what_fails_or_finds_no_time_is_a_row(tmp_path: Path) -> None:
    def fails() -> dict:
        raise RuntimeError("no such kernel")

    def too_large() -> dict:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def absent() -> dict:
        import no_such_package  # type: ignore[import-not-found]

        return no_such_package.rows

    made = record(tmp_path)
    assert made.attempt(fails) == {"missing": "RuntimeError: no such kernel"}
    assert made.attempt(too_large) == {"missing": "does not fit into memory"}
    assert made.attempt(absent) == {"missing": "not installed: no_such_package"}
    assert made.attempt(lambda: {"ms": 1}) == {"ms": 1}
    assert record(tmp_path, seconds=30).attempt(fails, seconds=40) == {"missing": NO_TIME}

    late = record(tmp_path, seconds=0, match="kmeans")
    run_checks(late, CPU, True)
    assert late.attempt(fails) == {"missing": NO_TIME}
    rows = json.loads(late.path.read_text())["checks"]
    assert rows
    assert all(row["missing"] == NO_TIME and "kmeans" in row["check"] for row in rows)


def test_a_model_that_does_not_fit_is_a_row_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Large(BareStep):
        def __init__(self, shape: Shape, device: torch.device, **options: object) -> None:
            if shape.images == 8:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(shape, device, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("benchmarks.gpu_training.BareStep", Large)
    made = record(tmp_path, match="eager")
    run_training(made, CPU, SMOKE, (8,), smoke=True)
    rows = made.found["training"]
    (large,) = (row for row in rows if "8 images" in row["case"])
    assert large == {"case": large["case"], "variant": "eager", "missing": "does not fit into memory"}
    (plain,) = (row for row in rows if row["variant"] == "eager, plain NT-Xent")
    assert rows.index(plain) > rows.index(large)
    assert plain["mfu_of_measured"] is None  # no limits were measured
    assert plain["ms"] > 0


def test_the_first_name_on_the_data_sheet_counts() -> None:
    assert data_sheet_tflop_s("NVIDIA H100 80GB HBM3") == 989.4
    assert data_sheet_tflop_s("NVIDIA H100 PCIe") == 756.0
    assert data_sheet_tflop_s("CPU, interpreted") is None


def test_limits_are_rates(tmp_path: Path) -> None:
    made = record(tmp_path)
    measure_limits(made, CPU, True)
    assert made.found["environment"]["seed"] == 0
    assert made.found["limits"].pop("data_sheet_bf16_tflop_s") is None
    assert all(rate > 0 for rate in made.found["limits"].values())


def test_a_part_that_takes_too_long_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
    written = tmp_path / "pid"
    problem = gpu.in_a_child(["sh", "-c", f"sleep 100 & echo $! > {written}; wait"], 3.0)
    assert problem == "killed after 3 s; the rows before are there"
    deadline = time.monotonic() + 30
    while runs(int(written.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert gpu.in_a_child(["true"], 60) == ""
    assert gpu.in_a_child(["sh", "-c", "kill -SEGV $$"], 60) == "ended with code -11; the rows before are there"


def runs(process: int) -> bool:
    """Whether it does; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], ["limits", "checks", "kernels", "resnet50", "resnet18", "engine"]),
        (["--data", "."], ["limits", "checks", "kernels", "resnet50", "resnet18", "engine", "speedrun"]),
        (["--skip", "training,checks"], ["limits", "kernels"]),
        (["--only", "training", "--skip", "resnet50"], ["limits", "resnet18", "engine"]),
        (["--only", "speedrun", "--data", "."], ["limits", "speedrun"]),
        (["--only", "limits"], ["limits"]),
    ],
)
def test_parts_are_chosen(options: list[str], names: list[str]) -> None:
    parser = gpu.make_parser()
    assert gpu.chosen_parts(parser, parser.parse_args(options)) == names


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--skip", "trainings"], "there is no part trainings"),
        (["--minutes", "0"], "--minutes is 0.0"),
        (["--minutes", "nan"], "--minutes is nan"),
        (["--minutes", "inf"], "--minutes is inf"),
        (["--only", "speedrun"], "needs --data"),
        (["--data", "no/such/folder"], "there is no no/such/folder"),
        (["--only", "checks", "--skip", "checks"], "nothing to do"),
    ],
)
def test_options_that_make_no_sense_are_one_line(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = gpu.make_parser()
    with pytest.raises(SystemExit) as ended:
        gpu.chosen_parts(parser, parser.parse_args(options))
    assert ended.value.code == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("code", [0, 3])
def test_what_the_speedrun_wrote_goes_into_the_record(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "benchmarks" / "cifar_speedrun.py"
    script.parent.mkdir()
    script.write_text(f"import json, sys; json.dump(sys.argv[1:], open(sys.argv[4], 'w')); sys.exit({code})")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    options = gpu.make_parser().parse_args(["--data", "cifar", "--one-process"])
    made = record(tmp_path, seconds=240)
    told = f"SystemExit: benchmarks/cifar_speedrun.py ended with code {code}" if code else ""
    assert gpu.in_this_process("speedrun", made, options) == told
    assert made.found["speedrun"]["code"] == code
    given = made.found["speedrun"]["found"]
    assert (given[0:2], given[2], given[4]) == (["--data", "cifar"], "--json", "--minutes")
    assert float(given[5]) == pytest.approx(4, abs=0.5)


def test_a_misspelt_name_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = gpu.make_parser().parse_args(["--match", "kmaens", "--one-process", "--smoke"])
    assert gpu.run_parts(["checks"], record(tmp_path), options) == 2
    assert "nothing in these parts has 'kmaens' in its name" in capsys.readouterr().err


def test_it_trains_without_pydantic_and_deepspeed(tmp_path: Path) -> None:
    """The parts that `train.py` builds, on a machine where only PyTorch and torchvision are."""
    options = ["--only", "resnet18,engine", "--match", "plain", "--one-process", "--smoke"]
    finished = run(*options, "--json", str(tmp_path / "found.json"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["environment"]["settings"] == "stand-in"
    assert [part["part"] for part in found["parts"]] == ["limits", "resnet18", "engine"]
    assert all(part["problem"] == "" for part in found["parts"])
    assert sum(part["share"] for part in found["parts"][:1]) < 8.5 * 60
    assert all(row["ms"] > 0 for row in found["training"] if row.get("kind") == "step")


def test_a_child_measures_and_the_parent_reads_it(tmp_path: Path) -> None:
    made = record(tmp_path)
    options = gpu.make_parser().parse_args(["--smoke", "--minutes", "5", "--seed", "3", "--json", str(made.path)])
    assert gpu.run_parts(["limits"], made, options) == 0
    found = json.loads(made.path.read_text())
    assert found["limits"]["copy_gb_s"] > 0
    assert found["environment"].keys() >= {"seed", "settings", "device", "torch"}
    (part,) = found["parts"]
    assert part["problem"] == ""
    assert 0 < part["seconds"] <= found["seconds"]
    assert part["share"] == pytest.approx(300, abs=1)  # the only part has all the time
    assert list(tmp_path.iterdir()) == [made.path]


def test_time_that_a_part_leaves_over_goes_to_those_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "run_part", lambda name, made, options: [][0])
    options = gpu.make_parser().parse_args(["--minutes", "7", "--one-process"])
    made = record(tmp_path)
    assert gpu.run_parts(["checks", "kernels", "resnet50"], made, options) == 1
    weights = {"checks": 2.0, "kernels": 2.0, "resnet50": 2.5}
    for row, shared in zip(made.found["parts"], (6.5, 4.5, 2.5), strict=True):
        assert row["share"] == pytest.approx(420 * weights[row["part"]] / shared, abs=2)
        assert row["problem"].startswith("IndexError")


def test_a_speedrun_that_is_killed_leaves_what_it_had_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = record(tmp_path)
    options = gpu.make_parser().parse_args(["--minutes", "1", "--data", str(tmp_path), "--json", str(made.path)])

    def killed(words: list[str], seconds: float) -> str:
        gpu.speedrun_file(made).write_text('{"found": {"short": 1}}')
        return "killed"

    monkeypatch.setattr(gpu, "in_a_child", killed)
    assert gpu.run_parts(["speedrun"], made, options) == 1
    found = json.loads(made.path.read_text())
    assert found["speedrun"] == {"code": None, "found": {"found": {"short": 1}}}
    assert list(tmp_path.iterdir()) == [made.path]


def test_checks_that_found_no_time_are_no_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = gpu.make_parser().parse_args(["--one-process"])
    for rows, code in (([{"passed": True}, {"missing": NO_TIME}], 0), ([{"passed": True}, {"passed": False}], 1)):
        made = record(tmp_path)
        made.put("checks", rows)
        monkeypatch.setattr(gpu, "run_part", lambda name, made, options: None)
        assert gpu.run_parts(["checks"], made, options) == code


def test_the_engine_is_timed_beside_the_bare_step(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    from benchmarks.gpu_engine import run_engine

    made = record(tmp_path)
    run_engine(made, CPU, True)
    (row,) = made.found["engine"]
    assert row["over_bare"] == pytest.approx(row["ms"] / row["bare_ms"] - 1)
    assert row["images_per_second"] == pytest.approx(4000 / row["ms"])


@pytest.mark.gpu
def test_memory_and_one_graph_on_a_gpu(tmp_path: Path) -> None:
    made = record(tmp_path)
    made.put("limits", LIMITS)
    run_training(made, torch.device("cuda"), Shape("resnet18", 32, 64), (128,), smoke=True)
    rows = {(row["case"], row["variant"]): row for row in made.found["training"] if row.get("kind", "step") == "step"}
    assert not [row for row in rows.values() if "missing" in row]
    assert all(row["peak_gb"] > row["resident_gb"] > 0 for row in rows.values())
    graphs = [row for row in rows.values() if "captured" in row]
    assert [(row["captured"], row["problem"]) for row in graphs] == [("the whole step", "")] * 2
