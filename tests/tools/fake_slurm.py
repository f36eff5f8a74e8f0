"""sbatch, srun, scontrol and squeue, as far as a job script can tell: ``install`` puts them into a folder for PATH.

sbatch runs the script itself, again while it is requeued, and ends with its exit code. srun starts its command once a
node, with that node's variables, and ends with the highest exit code. Every node is this machine. What happened lies in
``FAKE_SLURM``: a line in ``starts`` for each start of the script, the processes of the step in ``step``.
"""

import os
import subprocess
import sys
from pathlib import Path

JOB = "4242"


def install(folder: Path) -> dict[str, str]:
    """The environment in which the commands are found."""
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "srun", "scontrol", "squeue"):
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        path.chmod(0o755)
    (folder / "state").write_text("RUNNING")
    return {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE_SLURM": str(folder)}


def sbatch(folder: Path, script: str) -> int:
    text = Path(script).read_text()
    nodes = next(line for line in text.splitlines() if line.startswith("#SBATCH --nodes=")).partition("=")[2]
    print(f"Submitted batch job {JOB}", flush=True)
    restarts = 0
    while True:
        with (folder / "starts").open("a") as file:
            file.write(f"{restarts}\n")
        job = {"SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "node[0-1]", "FAKE_NODES": nodes}
        job |= {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        code = subprocess.run(["bash", script], env=os.environ | job, check=False).returncode
        requeued = folder / "requeued"
        if not requeued.exists():
            return code
        requeued.unlink()
        restarts += 1


def srun(folder: Path, *arguments: str) -> int:
    command = list(arguments)
    while command[0].startswith("--"):
        command.pop(0)
    tasks = [
        subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node)})
        for node in range(int(os.environ["FAKE_NODES"]))
    ]
    draft = folder / "step.tmp"
    draft.write_text("\n".join(str(task.pid) for task in tasks))
    draft.replace(folder / "step")
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(folder: Path, *arguments: str) -> int:
    if arguments[:2] == ("show", "hostnames"):
        assert arguments[2] == "node[0-1]"
        print("127.0.0.1\n127.0.0.2")
        return 0
    assert arguments == ("requeue", JOB)
    (folder / "requeued").touch()
    return 0


def squeue(folder: Path, *arguments: str) -> int:
    assert JOB in arguments
    print((folder / "state").read_text())
    return 0


if __name__ == "__main__":
    verb = {"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "squeue": squeue}[sys.argv[1]]
    sys.exit(verb(Path(os.environ["FAKE_SLURM"]), *sys.argv[2:]))
