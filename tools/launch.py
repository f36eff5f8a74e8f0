"""Starts train.py on one machine or many, watches it, and says by its exit code what became of it.

    python -m tools.launch RECIPE.yaml --gpus 8
    python -m tools.launch RECIPE.yaml --processes 2                     # on the CPU
    python -m tools.launch RECIPE.yaml --hostfile hosts --gpus 8         # by ssh
    python -m tools.launch RECIPE.yaml --nodes 2 --gpus 8 --slurm --time 24:00:00
    python -m tools.launch RECIPE.yaml --nodes 2 --gpus 8 --kubernetes --image registry/twinstream:1 --print

--print shows exactly what would be run or written, and does nothing. The exit code is train.py's, whatever torchrun
makes of it: 0 done, 75 preempted, 69 a peer or the link was lost (both go on from the last checkpoint by the same
command), 1 failed, 2 refused. docs/operations/launch.md says the rest.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from configs.recipe import Recipe, RecipeError, claim_run_dir, load_recipe
from pipelines.sources import DataError
from tools.launching import hosts as ssh
from tools.launching.job import (
    PORT,
    TRAIN,
    Job,
    LaunchError,
    deepspeed_command,
    environment,
    shown,
    torchrun_command,
)
from tools.launching.kubernetes import manifest
from tools.launching.slurm import sbatch_script
from tools.launching.supervise import LOST, PREEMPTED, Child, Outcome, StopSignal, start_local, start_remote, supervise
from trainers.state import CheckpointError, locked
from trainers.status import LAUNCH

_CARRIED = ("NCCL_", "GLOO_", "TORCH_", "UCX_", "FI_", "OMP_NUM_THREADS", "PYTHONPATH", "LD_LIBRARY_PATH")
_CORES_OF_A_GPU = 8
_SLURM_RESTARTS = 20

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    recipe_path: Annotated[Path, typer.Argument(metavar="RECIPE.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key.sub=value")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; the host file's, or 1, unless given.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs of each node, a process for each.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes of each node, on the CPU.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Start on these hosts by ssh; lines 'host slots=8'.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write an sbatch script, and submit it.")] = False,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="With --print: a Job's manifest.")] = False,
    show: Annotated[bool, typer.Option("--print", help="Show what would be run or written; do nothing.")] = False,
    engine: Annotated[Literal["torchrun", "deepspeed"], typer.Option(help="The launcher.")] = "torchrun",
    node_rank: Annotated[
        str | None, typer.Option(help="Be this node of several: a number, or a variable's name.")
    ] = None,
    master_addr: Annotated[str | None, typer.Option(help="Where node 0 can be reached.")] = None,
    port: Annotated[int | None, typer.Option(min=1024, max=65535, help="At which the nodes meet, on node 0.")] = None,
    interface: Annotated[str | None, typer.Option(help="Network interface for gloo and NCCL, such as eth0.")] = None,
    rendezvous: Annotated[int, typer.Option(min=1, help="Seconds that nodes wait for each other at the start.")] = 900,
    grace: Annotated[int, typer.Option(min=1, help="Seconds from a stop signal to the last checkpoint's end.")] = 120,
    threads: Annotated[int | None, typer.Option(min=1, help="OMP_NUM_THREADS of a process.")] = None,
    restarts: Annotated[
        int | None, typer.Option(min=0, help="Times to start again when a peer was lost (0; SLURM and Kubernetes: 20).")
    ] = None,
    restart_preempted: Annotated[
        bool, typer.Option("--restart-preempted", help="Start again when a rank was preempted, too.")
    ] = False,
    python: Annotated[str, typer.Option(help="Python on the nodes; this one unless given.")] = sys.executable,
    ssh_port: Annotated[int | None, typer.Option(min=1, max=65535)] = None,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Cores of a node, for SLURM and Kubernetes; 8 a GPU, or 1 a process.")
    ] = None,
    time: Annotated[str, typer.Option(help="SLURM's time limit.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="SLURM's.")] = None,
    account: Annotated[str | None, typer.Option(help="SLURM's.")] = None,
    sbatch: Annotated[list[str] | None, typer.Option(help="More for sbatch: --sbatch=--constraint=a100.")] = None,
    image: Annotated[str | None, typer.Option(help="Container image, for Kubernetes.")] = None,
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim at /shared, for Kubernetes.")] = "shared",
    workdir: Annotated[Path, typer.Option(help="Where the project lies in the image.")] = Path("/workspace"),
    stop_at_end: Annotated[bool, typer.Option("--stop-at-end-of-input", hidden=True)] = False,
) -> None:
    """Start a training run on one machine or many, and exit with its exit code."""
    try:
        _check_choices(
            {"--hostfile": hostfile, "--slurm": slurm, "--kubernetes": kubernetes, "--node-rank": node_rank}, engine
        )
        found: list[str] = []
        room = None
        if hostfile is not None:
            found, room = ssh.read_hostfile(hostfile, nodes, gpus or processes)
            nodes = len(found)
        remote = hostfile is not None or slurm or kubernetes
        ranks, gpu = _ranks(gpus, processes, room, here=not remote and not show, several=remote or (nodes or 1) > 1)
        recipe = load_recipe(recipe_path, overrides or [], world_size=(nodes or 1) * ranks)
        job = Job(
            recipe_path,
            tuple(overrides or []),
            recipe.run_dir(recipe_path.stem),
            *(nodes or 1, ranks, gpu, engine, port, interface, rendezvous, grace, threads, python),
        )
        cores = cpus or ranks * (_CORES_OF_A_GPU if gpu else 1)
        again = restarts if restarts is not None else _SLURM_RESTARTS if slurm or kubernetes else 0
        if slurm:
            extra = [f"--partition={partition}"] * bool(partition) + [f"--account={account}"] * bool(account)
            output = f"{job.run_dir}/{LAUNCH}/slurm-%j.out"
            if any(option.startswith("--output=") for option in sbatch or []):
                output = "slurm-%j.out"
            script = sbatch_script(
                job, Path.cwd(), output, cores=cores, time=time, restarts=again, options=[*extra, *(sbatch or [])]
            )
            code = _submit(script, job.run_dir / LAUNCH / "job.sbatch", show)
        elif kubernetes:
            if not show or image is None:
                raise LaunchError("--kubernetes writes a manifest: give --image and --print, and pipe it into kubectl")
            print(manifest(job, image=image, claim=claim, cores=cores, restarts=again, folder=workdir), end="")
            code = 0
        elif hostfile is not None:
            code = _run_on_hosts(job, recipe, found, master_addr, ssh_port, again, restart_preempted, show)
        else:
            rank = _node_rank(node_rank, job, master_addr, again, show)
            code = _run_here(job, recipe, rank, master_addr, again, restart_preempted, stop_at_end, show)
    except (RecipeError, DataError, CheckpointError, LaunchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(code)


def _check_choices(ways: dict[str, object], engine: str) -> None:
    chosen = [name for name, value in ways.items() if value not in (None, False)]
    if len(chosen) > 1:
        raise LaunchError(f"{' and '.join(chosen)} are different ways to start; choose one")
    if engine == "deepspeed" and chosen and chosen != ["--hostfile"]:
        raise LaunchError(f"--engine deepspeed starts this machine or --hostfile's; {chosen[0]} uses torchrun")


def _ranks(gpus: int | None, processes: int | None, room: int | None, *, here: bool, several: bool) -> tuple[int, bool]:
    """Processes of a node, and whether each has a GPU."""
    if gpus and processes:
        raise LaunchError(f"--gpus {gpus} starts a process for each GPU; leave --processes out")
    if gpus is None and processes is None:
        if room is not None:
            return room, True
        if several:
            raise LaunchError("say what a node has: --gpus N, or --processes N for training on the CPU")
        gpus = torch.cuda.device_count()
    if gpus and here and gpus > torch.cuda.device_count():
        raise LaunchError(
            f"--gpus {gpus}, but PyTorch sees {torch.cuda.device_count()} here; --processes N trains on the CPU"
        )
    return gpus or processes or 1, bool(gpus)


def _node_rank(given: str | None, job: Job, master_addr: str | None, restarts: int, show: bool) -> int | None:
    """Which node this is: 0 if it is the only one, None if all are only to be shown.

    Raises:
        LaunchError: it is not said, or not among those that there are.
    """
    if given is None:
        if job.nodes > 1 and not (show and master_addr):
            raise LaunchError(
                f"--nodes {job.nodes} needs --hostfile, --slurm or --kubernetes, or on each node --node-rank and"
                " --master-addr; --master-addr and --print show each node's command"
            )
        return 0 if job.nodes == 1 else None
    text = os.environ.get(given, "") if not given.isdecimal() else given
    if not text.isdecimal() or int(text) >= job.nodes:
        what = f"--node-rank {given}" + (f" (which is {text!r})" if text != given else "")
        raise LaunchError(f"{what} is not the number of one of {job.nodes} nodes, counted from 0")
    if job.nodes > 1 and master_addr is None:
        raise LaunchError("--node-rank needs --master-addr, where node 0 can be reached")
    if restarts:
        raise LaunchError("--restarts is for what starts all nodes: a single node cannot start the others again")
    return int(text)


def _run_here(
    job: Job,
    recipe: Recipe,
    rank: int | None,
    master_addr: str | None,
    restarts: int,
    restart_preempted: bool,
    stop_at_end: bool,
    show: bool,
) -> int:
    """This node's launcher, or with ``rank`` None all nodes' commands."""
    variables = environment(job)
    if show:
        for number in range(job.nodes) if rank is None else [rank]:
            if rank is None:
                print(f"# node {number}")
            print(shown(_node_command(job, number, master_addr), variables))
        return 0
    assert rank is not None
    if rank == 0:
        _claim(job, recipe)
    stop = StopSignal()
    if stop_at_end:
        stop.watch_input()

    def start() -> list[Child]:
        command = _node_command(job, rank, master_addr)
        _say(shown(command, variables))
        return [start_local(command, variables, TRAIN)]

    settle = recipe.engine.timeout + job.grace
    once = partial(supervise, start, job.run_dir, stop, grace=job.grace, settle=settle, leads=rank == 0)
    return _repeat(once, stop, restarts, restart_preempted)


def _node_command(job: Job, rank: int, master_addr: str | None) -> list[str]:
    if job.engine == "deepspeed":
        return deepspeed_command(job, job.port or _free_port())
    return torchrun_command(job, rank, master_addr)


def _run_on_hosts(
    job: Job,
    recipe: Recipe,
    found: list[str],
    master_addr: str | None,
    ssh_port: int | None,
    restarts: int,
    restart_preempted: bool,
    show: bool,
) -> int:
    """By ssh, an agent a host; or by DeepSpeed's launcher, which uses pdsh."""
    if job.engine == "deepspeed":
        written = job.run_dir / LAUNCH / "hostfile"
        text = ssh.deepspeed_hostfile(found, job.processes)
        command, variables = deepspeed_command(job, job.port or PORT, written, master_addr), environment(job)
        if show:
            print(f"# {written}\n{text}\n{shown(command, variables)}")
            return 0
        _claim(job, recipe)
        _write(written, text)
        start = partial(_start_all, [(shown(command, variables), partial(start_local, command, variables, TRAIN))])
    else:
        carried = {name: value for name, value in os.environ.items() if name.startswith(_CARRIED)}
        addr = master_addr or ssh.host_names(found)[0]
        texts = ssh.remote_commands(job, found, addr, Path.cwd(), carried)
        commands = [ssh.ssh_command(host, text, ssh_port) for host, text in zip(found, texts, strict=True)]
        if show:
            print("\n".join(shown(command) for command in commands))
            return 0
        _claim(job, recipe)
        start = partial(_start_all, [(shown(command), partial(start_remote, command)) for command in commands])
    stop = StopSignal()
    settle = recipe.engine.timeout + job.grace
    patience = job.grace + 30  # the agents there keep to --grace themselves
    once = partial(supervise, start, job.run_dir, stop, grace=patience, settle=settle)
    return _repeat(once, stop, restarts, restart_preempted)


def _start_all(starts: list[tuple[str, partial[Child]]]) -> list[Child]:
    children = []
    for text, start in starts:
        _say(text)
        children.append(start())
    return children


def _repeat(once: partial[Outcome], stop: StopSignal, restarts: int, restart_preempted: bool) -> int:
    """Run, and run again after what can go on, at most so often and only while checkpoints are made."""
    again = (LOST, PREEMPTED) if restart_preempted else (LOST,)
    for attempt in range(restarts + 1):
        outcome = once()
        if stop.reason or outcome.code not in again or not restarts:
            break
        if attempt == restarts:
            _say(f"started again {restarts} times, as often as --restarts allows")
        elif not outcome.progressed:
            _say("not started again: no checkpoint was written since the last start")
            break
        else:
            _say(f"{outcome.line}; start {attempt + 1} of {restarts} again")
    _say(f"{outcome.line} [exit code {outcome.code}]")
    return outcome.code


def _claim(job: Job, recipe: Recipe) -> None:
    """Refuse a folder that is in use or another run's before anything is started, as rank 0 would after it."""
    with locked(job.run_dir):
        if remark := claim_run_dir(job.run_dir, recipe):
            _say(remark)


def _submit(script: str, path: Path, show: bool) -> int:
    if show:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise LaunchError("there is no sbatch on this machine; --print shows the script, for one where there is")
    _write(path, script)
    return subprocess.run(["sbatch", str(path)], check=False).returncode


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()
