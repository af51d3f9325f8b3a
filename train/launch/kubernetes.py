"""Engine `k8s`: a JobSet as YAML, for `kubectl apply -f -`. Nothing here talks to a cluster. JAX-free.

    Job `supervisor`   one pod, no accelerator: `meshwright launch --engine agents`
    Job `workers`      one pod a process: an agent, which starts trainers again in place

A trainer that dies or hangs is started again inside its living pod, by the supervisor through the agent. A pod that is
lost with its node is replaced alone (`backoffLimit` is the greatest number, as in JobSet's own in-place strategy), and
its agent connects. Only the failure of the supervisor starts the whole set again, `launch.k8s.restarts` times at most.

Fields: JobSet v1alpha2 (kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go), Job and Pod of Kubernetes 1.31.
"""

import math
import re
import sys
from typing import Any

import yaml

from ...configs.errors import Preemption, UserError
from ...configs.hardware_targets import parse_topology
from ...configs.sections.launch import KubernetesConfig
from .job import Job

PORT = 29400  # at which the supervisor's pod listens
CONFIG = "/etc/meshwright"
PYTHON = "python"  # of the image
UNLIMITED = 2**31 - 1
MARGIN = 15  # seconds a pod has beyond elastic.grace, to end


def launch(job: Job) -> None:
    """Print the manifests."""
    sys.stdout.write(yaml.dump_all(manifests(job), Dumper=BlockDumper, sort_keys=False))


class BlockDumper(yaml.SafeDumper):
    """Writes texts of several lines as block scalars, as people write them."""


BlockDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def manifests(job: Job) -> list[dict[str, Any]]:
    """The configuration and the JobSet. Raises UserError where a key is missing that a cluster needs."""
    settings = job.settings.k8s
    for key in ("image", "claim"):
        if getattr(settings, key) is None:
            raise UserError(f"launch.k8s.{key}: null, and engine k8s needs it; see docs/launch.md")
    name = dns_label(job.name)
    metadata = {"name": name, "namespace": settings.namespace}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"config.yaml": job.document}}
    queue = {"labels": {"kueue.x-k8s.io/queue-name": settings.queue}} if settings.queue else {}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {**metadata, **queue},
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name, "publishNotReadyAddresses": True},
            "coordinator": {"replicatedJob": "supervisor", "jobIndex": 0, "podIndex": 0},
            "successPolicy": {"operator": "All", "targetReplicatedJobs": ["supervisor"]},
            "failurePolicy": failure_policy(settings),
            "replicatedJobs": [
                {"name": "supervisor", "replicas": 1, "template": {"spec": supervisor_job(job, name)}},
                {"name": "workers", "replicas": 1, "template": {"spec": worker_job(job, name)}},
            ],
        },
    }
    return [config, jobset]


def dns_label(name: str) -> str:
    """A run's name as a DNS label that leaves room for what JobSet appends. Raises UserError.

    >>> dns_label("My_run 2")
    'my-run-2'
    """
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    if not label or not label[0].isalpha():
        raise UserError(f"name: {name} has no letter at its beginning, which Kubernetes needs; choose another name")
    return label


def failure_policy(settings: KubernetesConfig) -> dict[str, Any]:
    """A refused configuration ends the set; another failure of the supervisor starts all again."""
    refused = {
        "name": "refused",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
        "targetReplicatedJobs": ["supervisor"],
    }
    return {"maxRestarts": settings.restarts, "restartStrategy": "BlockingRecreate", "rules": [refused]}


def supervisor_job(job: Job, name: str) -> dict[str, Any]:
    """The Job of the supervisor: asked to stop (75) or evicted it is started again, refused (2) it is not."""
    command = [PYTHON, "-m", "meshwright.train.cli", "launch", f"{CONFIG}/config.yaml", "--engine", "agents"]
    command += ["--processes", str(job.processes)]
    if job.devices_per_process:
        command += ["--devices-per-process", str(job.devices_per_process)]
    command += [f"launch.listen={supervisor_host(name)}:{PORT}"]
    codes = {"containerName": "supervisor", "operator": "In"}
    rules = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {**codes, "values": [Preemption.exit_code]}},
        {"action": "FailJob", "onExitCodes": {**codes, "values": [UserError.exit_code]}},
    ]
    container = {"name": "supervisor", "command": command, "ports": [{"containerPort": PORT}]}
    return {
        "parallelism": 1,
        "completions": 1,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod_spec(job, name, container)},
    }


def worker_job(job: Job, name: str) -> dict[str, Any]:
    """The Job of the agents, whose completion index is the slot."""
    settings = job.settings.k8s
    command = [PYTHON, "-m", "meshwright.train.launch.agent", f"{supervisor_host(name)}:{PORT}"]
    amounts = {"cpu": settings.cpu, "memory": settings.memory, "nvidia.com/gpu": settings.gpus or None}
    amounts |= device_request(settings, processes=job.processes)
    limits = {resource: str(amount) for resource, amount in amounts.items() if amount is not None}
    resources = {"resources": {"requests": limits, "limits": limits}} if limits else {}
    container = {"name": "agent", "command": command, **resources}
    return {
        "parallelism": job.processes,
        "completions": job.processes,
        "completionMode": "Indexed",
        "backoffLimit": UNLIMITED,
        "podReplacementPolicy": "Failed",
        "template": {"spec": pod_spec(job, name, container)},
    }


def device_request(settings: KubernetesConfig, *, processes: int) -> dict[str, int]:
    """Resource -> devices of each process for `launch.k8s.target`; {} without one. Raises UserError if they differ."""
    if settings.target is None:
        return {}
    topology = parse_topology(settings.target, key="launch.k8s.target")
    target, chips = topology.target, math.prod(topology.shape)
    if target.resources.kubernetes_chips is None:  # any number of processes shares GPUs
        if chips % processes:
            raise UserError(
                f"launch.processes: {processes} do not share the {chips} devices of {settings.target} evenly; use a "
                f"divisor of {chips}"
            )
        return {target.resources.kubernetes: chips // processes}
    fit_one_node = topology.devices <= target.devices_per_host
    per_node = chips if fit_one_node else target.resources.kubernetes_chips
    if processes != chips // per_node:
        raise UserError(
            f"launch.processes: {processes}, but {settings.target} has {chips // per_node} nodes of {per_node} chips; "
            f"use launch.processes={chips // per_node}"
        )
    return {target.resources.kubernetes: per_node}


def device_selector(settings: KubernetesConfig) -> dict[str, str]:
    """Labels of the nodes of the TPU slice `launch.k8s.target`; {} for all else."""
    if settings.target is None:
        return {}
    topology = parse_topology(settings.target, key="launch.k8s.target")
    accelerator = topology.target.resources.kubernetes_accelerator
    if accelerator is None:
        return {}
    return {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.shape)),
    }


def supervisor_host(name: str) -> str:
    """The host name of the supervisor's pod, as JobSet's headless service knows it."""
    return f"{name}-supervisor-0-0.{name}"


def pod_spec(job: Job, name: str, container: dict[str, Any]) -> dict[str, Any]:
    """A pod of one container, with the time to save that a trainer has, the claim and its own shared memory."""
    settings = job.settings.k8s
    mounts = [
        {"name": "work", "mountPath": settings.mount},
        {"name": "config", "mountPath": CONFIG, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    environment = [{"name": "MESHWRIGHT_CACHE", "value": f"{settings.mount}/cache"}]
    spec = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(job.elastic.grace) + MARGIN,
        "containers": [
            {**container, "image": settings.image, "workingDir": settings.mount, "env": environment}
            | {"volumeMounts": mounts}
        ],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": settings.claim}},
            {"name": "config", "configMap": {"name": name}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    selector = device_selector(settings) | settings.node_selector
    if selector and container["name"] == "agent":
        spec["nodeSelector"] = selector
    if settings.service_account:
        spec["serviceAccountName"] = settings.service_account
    return spec
