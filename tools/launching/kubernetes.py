"""A Kubernetes manifest: an Indexed Job, one pod a node, and the headless service by which the pods find pod 0."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tools.launching.job import PORT, Job, agent_command

_PREEMPTED, _FINAL = [75], [1, 2]  # exit codes of the agent; 69 counts, so that a link that stays bad ends the job
_DOWN = 30  # seconds from a checkpoint's end to the container's


def manifest(job: Job, *, image: str, claim: str, cores: int, restarts: int, folder: Path) -> str:
    """YAML of the service and the job.

    Args:
        image: holds this project in ``folder``, and ``python``.
        claim: a PersistentVolumeClaim (ReadWriteMany) for data and runs, mounted at /shared.
        cores: of a pod.
        restarts: how often a lost run is started again; a preempted one always is.
    """
    name = re.sub(r"[^a-z0-9-]+", "-", job.run_dir.name.lower()).strip("-")[:40].strip("-") or "twinstream"
    name = name if name[0].isalpha() else f"run-{name}"
    job = replace(job, python="python", port=job.port or PORT)
    # Kubernetes fills in $(NAME) in a command, and takes $$ for a dollar.
    command = [text.replace("$", "$$") for text in agent_command(job, "JOB_COMPLETION_INDEX", f"{name}-0.{name}")]
    limits: dict[str, Any] = {"cpu": cores} | ({"nvidia.com/gpu": job.processes} if job.gpu else {})
    container = {
        "name": "train",
        "image": image,
        "workingDir": str(folder),
        "command": command,
        "ports": [{"containerPort": job.port}],
        "resources": {"limits": limits},
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace + _DOWN,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL and decoding; a container's own has 64 MB
        ],
    }
    policy = [
        {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": _FINAL}},
        {"action": "Ignore", "onExitCodes": {"containerName": "train", "operator": "In", "values": _PREEMPTED}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"job-name": name}},
    }
    batch = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completions": job.nodes,
            "parallelism": job.nodes,
            "completionMode": "Indexed",
            "backoffLimit": restarts * job.nodes,  # a lost peer is a failure of every pod
            "podFailurePolicy": {"rules": policy},
            "template": {"spec": pod},
        },
    }
    return yaml.safe_dump_all([service, batch], sort_keys=False, width=1000)
