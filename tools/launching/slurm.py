"""The sbatch script: one ``tools.launch`` agent a node, and the job requeued when it can go on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from tools.launching.job import Job, LaunchError, agent_command

# #SBATCH lines are read by SLURM, not by a shell; what it would split or end a line at is not let in.
_PLAIN = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_@%+=:,./\[\]-]+)?")
_SECONDS_TO_SPARE = 60  # SLURM may signal this much later, counting from its own clock


class _Variable(str):
    """A word of the command that the script's shell fills in."""


def sbatch_script(
    job: Job, folder: Path, output: str, *, cores: int, time: str, restarts: int, options: Sequence[str]
) -> str:
    """The script, to be submitted as it is.

    Args:
        folder: the working directory on every node.
        output: file of what the job prints; ``%j`` is the job's number.
        cores: of a node, for the job.
        time: limit, as SLURM writes it.
        restarts: how often the job is put back into the queue at most.
        options: more for sbatch, such as ``--partition=gpu``; they come last, and so win.

    Raises:
        LaunchError: an option that is not of the form ``--name=value`` in plain characters.
    """
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", job.run_dir.name) or "twinstream"
    given = [f"--job-name={name}", f"--nodes={job.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={cores}"]
    given += [f"--gpus-per-node={job.processes}"] if job.gpu else []
    given += [f"--time={time}", f"--output={output}", "--open-mode=append", "--requeue"]
    given += [f"--signal=TERM@{job.grace + _SECONDS_TO_SPARE}"]
    for option in [*given, *options]:
        if not _PLAIN.fullmatch(option):
            raise LaunchError(f"{option!r} cannot stand in an #SBATCH line: write --name=value, in plain characters")
    directives = "\n".join(f"#SBATCH {option}" for option in [*given, *options])
    port = str(job.port) if job.port else _Variable('"$MASTER_PORT"')
    agent = agent_command(job, "SLURM_NODEID", _Variable('"$MASTER_ADDR"'), port=port)
    words = ["srun", f"--cpus-per-task={cores}", "--kill-on-bad-exit=0", *agent]
    srun = " ".join(word if isinstance(word, _Variable) else shlex.quote(word) for word in words)
    return f"""#!/bin/bash
{directives}

# Before the time limit, and at a preemption, SLURM sends SIGTERM to the agents: they write a checkpoint and exit
# with 75. A lost peer or link ends in 69. After both the job goes back into the queue.
trap : TERM  # this shell waits for the checkpoint
cd {shlex.quote(str(folder))} || exit 1
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
{srun}
code=$?
if [[ $code -eq 75 || $code -eq 69 ]]; then
  if [[ ${{SLURM_RESTART_COUNT:-0}} -ge {restarts} ]]; then
    echo "requeued {restarts} times; submit the script again to go on" >&2
  elif [[ $(squeue --noheader --job "$SLURM_JOB_ID" --format %T) == RUNNING ]]; then  # not cancelled
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
"""
