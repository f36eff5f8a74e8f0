"""What is to be started, and the exact command of one node: torchrun's, or DeepSpeed's launcher's."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
PORT = 29500  # PyTorch's own
_GPU_THREADS = 1  # the host's part of a GPU's work; decoding has threads of its own


class LaunchError(ValueError):
    """A launch that cannot be; the message is for the person who asked for it."""


@dataclass(frozen=True)
class Job:
    """A training run over ``nodes`` × ``processes``, each process a GPU's or one on the CPU."""

    recipe: Path
    overrides: tuple[str, ...]
    run_dir: Path
    nodes: int
    processes: int  # of one node
    gpu: bool
    engine: str = "torchrun"  # or deepspeed
    port: int | None = None  # None: any free one on one node, PORT on several
    interface: str | None = None  # the network's, for gloo and NCCL
    rendezvous: int = 900  # seconds that the nodes wait for each other at the start
    grace: int = 120  # seconds from a stop signal to the last checkpoint's end
    threads: int | None = None  # OMP_NUM_THREADS; None: what is set, else the cores shared out
    python: str = field(default=sys.executable)

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes

    @property
    def train_arguments(self) -> list[str]:
        return [str(self.recipe), *self.overrides]


def agent_command(job: Job, node_rank: str, master_addr: str, *more: str, port: str = "") -> list[str]:
    """``tools.launch`` for one node of several: started there, it runs and watches that node's torchrun.

    ``node_rank`` is a number, or the name of an environment variable that holds it.
    """
    command = [job.python, "-m", "tools.launch", *job.train_arguments, "--nodes", str(job.nodes)]
    command += ["--gpus" if job.gpu else "--processes", str(job.processes)]
    command += ["--node-rank", node_rank, "--master-addr", master_addr]
    command += ["--port", port or str(job.port or PORT)]
    command += ["--rendezvous", str(job.rendezvous), "--grace", str(job.grace)]
    command += ["--interface", job.interface] if job.interface else []
    command += ["--threads", str(job.threads)] if job.threads else []
    return [*command, *more]


def torchrun_command(job: Job, node_rank: int = 0, master_addr: str | None = None) -> list[str]:
    """One node's torchrun. Alone it finds a free port itself; one of several meets the others at a fixed one."""
    command = [job.python, "-m", "torch.distributed.run", "--nproc-per-node", str(job.processes)]
    if job.nodes > 1 or job.port:
        command += ["--nnodes", str(job.nodes), "--node-rank", str(node_rank)]
        command += ["--master-addr", master_addr or "127.0.0.1", "--master-port", str(job.port or PORT)]
        command += ["--rdzv-conf", f"timeout={job.rendezvous}"]
    else:
        command += ["--standalone"]
    if job.nodes == 1:  # else it asks the network for this host's name
        command += ["--local-addr", "127.0.0.1"]
    # torchrun fills in ${local_rank} in what it passes on, and takes $$ for a dollar.
    return [*command, *(text.replace("$", "$$") for text in [str(TRAIN), *job.train_arguments])]


def deepspeed_command(job: Job, port: int, hostfile: Path | None = None, master_addr: str | None = None) -> list[str]:
    """DeepSpeed's launcher: for this machine, or with ``hostfile`` for several by pdsh.

    Raises:
        LaunchError: an argument that DeepSpeed's pdsh command, which quotes nothing, would hand to a shell.
    """
    command = [job.python, "-m", "deepspeed.launcher.runner", "--num_gpus", str(job.processes)]
    command += ["--master_port", str(port)]
    if hostfile is not None:
        command += ["--hostfile", str(hostfile), "--num_nodes", str(job.nodes)]
        command += ["--master_addr", master_addr] if master_addr else []
        for text in [*job.train_arguments, str(TRAIN), str(Path.cwd()), job.python]:
            if unsafe := {c for c in text if not (c.isascii() and (c.isalnum() or c in "_@+=:,./-"))}:
                raise LaunchError(
                    f"{text!r}: DeepSpeed's launcher for several hosts passes this through a shell without quotes,"
                    f" where {' '.join(sorted(unsafe))!r} may mean something else; write it into a recipe, or leave"
                    " out --engine deepspeed"
                )
    return [*command, str(TRAIN), *job.train_arguments]


def environment(job: Job, cores: int | None = None) -> dict[str, str]:
    """The variables that a node's launcher gets on top of its own; ``cores`` are those that it may use."""
    added: dict[str, str] = {}
    if job.threads is not None:
        added["OMP_NUM_THREADS"] = str(job.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        shared = _GPU_THREADS if job.gpu else (cores or available_cores()) // job.processes
        added["OMP_NUM_THREADS"] = str(max(1, shared))
    if not job.gpu:
        added["DS_ACCELERATOR"] = "cpu"  # gloo, and no GPU even where there is one
    if job.interface:
        added |= {"GLOO_SOCKET_IFNAME": job.interface, "NCCL_SOCKET_IFNAME": job.interface}
    elif job.nodes == 1 and sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        added["GLOO_SOCKET_IFNAME"] = "lo"  # else a host that cannot look itself up fails
    if job.engine == "torchrun":
        added["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(job.grace)  # from SIGTERM to SIGKILL; 30 before PyTorch 2.12
    return added


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shown(command: list[str], variables: dict[str, str] | None = None) -> str:
    """As it can be pasted into a shell."""
    assigned = [f"{name}={shlex.quote(value)}" for name, value in (variables or {}).items()]
    return " ".join([*assigned, shlex.join(command)])
