"""The commands, scripts and manifests that ``tools.launch`` builds: what arrives at train.py is what was typed."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from torch.distributed.elastic.utils import macros
from torch.distributed.run import config_from_args, parse_args

from tests.tools.fake_slurm import install
from tools.launching.hosts import deepspeed_hostfile, read_hostfile, remote_commands, ssh_command
from tools.launching.job import (
    TRAIN,
    Job,
    LaunchError,
    agent_command,
    deepspeed_command,
    environment,
    shown,
    torchrun_command,
)
from tools.launching.kubernetes import manifest
from tools.launching.slurm import sbatch_script

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/operations/launch.md"
HOSTILE = (
    "run.dir=a; touch pwned",
    "data.root=$(touch pwned)",
    "data.url=`touch pwned`",
    "log.note='\"'\"' && touch pwned #",
    "a.b=$$ ${local_rank} $HOME %n \\ é\t{x: [1, 2]}",
    '"$MASTER_ADDR"=x',
)
JOB = Job(Path("my recipes/$x's.yaml"), HOSTILE, Path("runs/a; touch pwned"), 2, 3, False)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """In the place of Python: writes down what it is called with, and ends with this start's code in ``codes``."""
    path = tmp_path / "python of mine"
    path.write_text(f"""#!{sys.executable}
import json, os, sys
with open({str(tmp_path / "calls")!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ.get("OF_MINE"), os.getcwd()]) + "\\n")
codes, starts = {str(tmp_path / "codes")!r}, {str(tmp_path / "slurm/starts")!r}
if os.path.exists(codes):
    sys.exit(int(open(codes).read().split()[len(open(starts).read().split()) - 1]))
""")
    path.chmod(0o755)
    return path


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line)[0] for line in (folder / "calls").read_text().splitlines()]


def test_torchrun_hands_on_what_was_typed() -> None:
    command = torchrun_command(JOB, 1, "a")
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    arguments = parse_args(command[3:])
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "3", 1)
    assert (arguments.master_addr, arguments.master_port) == ("a", 29500)
    config, _, given = config_from_args(arguments)
    assert config.rdzv_configs["timeout"] == "900"
    assert macros.substitute(given, "0") == ["-u", str(TRAIN), str(JOB.recipe), *HOSTILE]


def test_one_node_finds_its_own_port_unless_one_is_given() -> None:
    alone = replace(JOB, nodes=1)
    assert parse_args(torchrun_command(alone)[3:]).standalone
    fixed = parse_args(torchrun_command(replace(alone, port=4000))[3:])
    assert (fixed.standalone, fixed.master_port, fixed.master_addr) == (False, 4000, "127.0.0.1")


def test_what_is_shown_can_be_pasted(python: Path, tmp_path: Path) -> None:
    command = torchrun_command(replace(JOB, python=str(python)), 0, "a")
    subprocess.run(["sh", "-c", shown(command, {"OF_MINE": "a; touch pwned"})], cwd=tmp_path, check=True)
    assert calls(tmp_path) == [command[1:]]
    assert json.loads((tmp_path / "calls").read_text())[1] == "a; touch pwned"
    assert not (tmp_path / "pwned").exists()


def test_ssh_hands_on_what_was_typed(python: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work; touch pwned"
    folder.mkdir()
    job = replace(JOB, python=str(python))
    texts = remote_commands(job, ["a", "me@b"], "a", folder, {"OF_MINE": "$(touch pwned)"})
    assert ssh_command("me@b", texts[1], 2222)[-4:] == ["-p", "2222", "me@b", texts[1]]
    for text in texts:
        subprocess.run(["sh", "-c", text], cwd=tmp_path, check=True)  # as the host's login shell does
    called = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    for rank, (arguments, variable, where) in enumerate(called):
        assert arguments == agent_command(job, str(rank), "a", "--stop-at-end-of-input")[1:]
        assert variable == "$(touch pwned)"
        assert where == str(folder)
    assert len(called) == 2
    assert sorted(tmp_path.rglob("pwned")) == []


def test_deepspeed_on_several_hosts_refuses_what_a_shell_would_read() -> None:
    plain = Job(Path("r.yaml"), ("run.dir=a", "optim.lr=1.0e-3"), Path("a"), 2, 8, True, python="/usr/bin/python")
    command = deepspeed_command(plain, 29500, Path("a/launch/hostfile"))
    assert command[-3:] == ["r.yaml", "run.dir=a", "optim.lr=1.0e-3"]
    assert "--hostfile" in command
    for override in HOSTILE[:5]:
        hostile = replace(plain, overrides=(override,))
        with pytest.raises(LaunchError, match="without quotes"):
            deepspeed_command(hostile, 29500, Path("hostfile"))
        assert deepspeed_command(hostile, 29500)[-1] == override  # on one machine no shell is in between


def test_the_environment_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    assert environment(JOB, cores=8)["OMP_NUM_THREADS"] == "2"
    assert environment(JOB, cores=2)["OMP_NUM_THREADS"] == "1"
    assert environment(replace(JOB, threads=5), cores=8)["OMP_NUM_THREADS"] == "5"
    assert environment(JOB)["DS_ACCELERATOR"] == "cpu"
    assert environment(JOB)["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "120"
    assert "GLOO_SOCKET_IFNAME" not in environment(JOB)
    gpus = environment(replace(JOB, gpu=True, interface="eth1"), cores=64)
    assert "DS_ACCELERATOR" not in gpus
    assert (gpus["GLOO_SOCKET_IFNAME"], gpus["NCCL_SOCKET_IFNAME"]) == ("eth1", "eth1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "OMP_NUM_THREADS" not in environment(JOB)


def test_host_files(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# mine\nnode-1 slots=8\n\nme@10.0.0.2 slots=8  # the second\nnode3.example.org slots=8\n")
    assert read_hostfile(path) == (["node-1", "me@10.0.0.2", "node3.example.org"], 8)
    assert read_hostfile(path, 2, 4) == (["node-1", "me@10.0.0.2"], 8)
    assert deepspeed_hostfile(["a", "b"], 4) == "a slots=4\nb slots=4\n"
    path.write_text("a\nb\n")
    assert read_hostfile(path) == (["a", "b"], None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no host"),
        ("a slots=x", "line 1"),
        ("a slots=0", "line 1"),
        ("a\nb slots=1 max=2", "line 2"),
        ("a\na", "there twice"),
        ("-oProxyCommand=touch", "line 1"),
        ("a;touch", "line 1"),
        ("$(touch)", "line 1"),
        ("a slots=2", "slots=2"),
        ("a slots=4\nb slots=8", "slots"),
        ("a slots=4", "names only 1"),
        ("\udcff", "cannot be read"),
    ],
)
def test_host_files_that_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(text.encode(errors="surrogateescape"))
    nodes = 2 if said == "names only 1" else None
    with pytest.raises(LaunchError, match=said):
        read_hostfile(path, nodes, None if said == "slots" else 4)


def submit(job: Job, tmp_path: Path, codes: str, state: str = "RUNNING", restarts: int = 20) -> tuple[int, int]:
    """Run the job's script under the fake SLURM; returns its exit code and how often it started."""
    variables = install(tmp_path / "slurm")
    (tmp_path / "codes").write_text(codes)
    (tmp_path / "slurm/state").write_text(state)
    script = tmp_path / "job.sbatch"
    script.write_text(sbatch_script(job, tmp_path, "out", cores=3, time="1:00:00", restarts=restarts, options=[]))
    done = subprocess.run(["sbatch", str(script)], env=os.environ | variables, cwd=tmp_path, timeout=100, check=False)
    return done.returncode, len((tmp_path / "slurm/starts").read_text().split())


def test_slurm_hands_on_what_was_typed_and_requeues_what_can_go_on(python: Path, tmp_path: Path) -> None:
    job = replace(JOB, python=str(python))
    assert submit(job, tmp_path, "75 69 0") == (0, 3)
    expected = agent_command(job, "SLURM_NODEID", "127.0.0.1", port=str(20000 + 4242))[1:]
    assert calls(tmp_path) == [expected] * 6
    assert list(tmp_path.rglob("pwned")) == []


@pytest.mark.parametrize(
    ("codes", "state", "restarts", "expected"),
    [
        ("75 75 75 75", "RUNNING", 2, (75, 3)),  # as often as was asked for
        ("75 0", "COMPLETING", 20, (75, 1)),  # cancelled meanwhile, or requeued by SLURM itself
        ("1 0", "RUNNING", 20, (1, 1)),
        ("2 0", "RUNNING", 20, (2, 1)),
    ],
)
def test_slurm_does_not_requeue_for_ever(
    python: Path, tmp_path: Path, codes: str, state: str, restarts: int, expected: tuple[int, int]
) -> None:
    assert submit(replace(JOB, python=str(python)), tmp_path, codes, state, restarts) == expected


@pytest.mark.parametrize("option", ["--comment=a b", "--x=1\n#SBATCH --y", "-p gpu", "--x='1'", "gpu", "--x=$(y)"])
def test_no_option_ends_its_line(option: str) -> None:
    with pytest.raises(LaunchError, match="#SBATCH"):
        sbatch_script(JOB, Path("/"), "out", cores=1, time="1", restarts=0, options=[option])


def blocks(language: str) -> list[str]:
    parts = GUIDE.read_text().split(f"```{language}\n")[1:]
    return [part.partition("```")[0] for part in parts]


def test_the_guides_sbatch_script_is_the_one_that_is_written() -> None:
    typed = ("data.root=/data/imagenet", "run.dir=runs/r50")
    recipe = Path("configs/imagenet/resnet50_100ep.yaml")
    job = Job(recipe, typed, Path("runs/r50"), 2, 8, True, python=".venv/bin/python")
    folder = Path("/home/me/twinstream")
    script = sbatch_script(
        job, folder, "runs/r50/launch/slurm-%j.out", cores=64, time="24:00:00", restarts=20,
        options=["--partition=gpu"],
    )  # fmt: skip
    assert blocks("bash") == [script]


def test_the_guides_manifest_is_the_one_that_is_written() -> None:
    typed = ("data.root=/shared/imagenet", "run.dir=/shared/runs/r50")
    job = Job(Path("configs/imagenet/resnet50_100ep.yaml"), typed, Path("/shared/runs/r50"), 2, 8, True)
    written = manifest(
        job, image="registry.example.org/twinstream:1", claim="shared", cores=64, restarts=20, folder=Path("/workspace")
    )
    assert blocks("yaml") == [written]
    service, batch = yaml.safe_load_all(written)
    pod = batch["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    expected = agent_command(replace(job, python="python"), "JOB_COMPLETION_INDEX", "r50-0.r50")
    assert container["command"] == expected
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": batch["metadata"]["name"]}
    assert pod["terminationGracePeriodSeconds"] > job.grace
    assert batch["spec"]["completions"] == batch["spec"]["parallelism"] == 2
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_kubernetes_hands_on_what_was_typed() -> None:
    written = manifest(JOB, image="x", claim="c", cores=1, restarts=1, folder=Path("/w"))
    _, batch = yaml.safe_load_all(written)
    assert batch["metadata"]["name"] == "a-touch-pwned"
    (container,) = batch["spec"]["template"]["spec"]["containers"]
    assert [text.replace("$$", "$") for text in container["command"][3:10]] == JOB.train_arguments
    assert not [text for text in container["command"] if "$(" in text.replace("$$", "")]


def test_commands_are_lists_that_a_shell_reads_back() -> None:
    for command in (torchrun_command(JOB, 0, "a"), deepspeed_command(JOB, 1), agent_command(JOB, "0", "a")):
        assert shlex.split(shown(command)) == command
