"""Where the processes of `meshwright launch` run: this machine, a SLURM or Ray cluster, Kubernetes."""

from typing import Literal

from pydantic import Field

from .base import Section


class SlurmConfig(Section):
    """A job of a SLURM cluster (engine slurm, extra `slurm`)."""

    partition: str | None = None
    """Of the cluster; null: its default."""
    account: str | None = None
    """That is charged; null: yours."""
    qos: str | None = None
    """Quality of service; null: the default."""
    time: int = Field(60, ge=1)
    """Minutes; when they are over the state is saved and the job queued again."""
    nodes: int = Field(1, ge=1)
    """Machines; launch.processes must be a multiple of it."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs of each machine, shared out among its processes; null: none is asked for."""
    cpus_per_task: int | None = Field(None, ge=1)
    """Cores of each process; null: the cluster's default."""
    memory: int | None = Field(None, ge=1)
    """GB of each machine; null: the cluster's default."""
    constraint: str | None = None
    """Features a machine must have, in SLURM's words."""
    requeues: int = Field(100, ge=0)
    """How often a job that ran out of time is queued again."""
    setup: list[str] = []
    """Lines of shell before the run: modules, environment."""
    executor: Literal["slurm", "local"] = "slurm"
    """local: submitit's executor on this machine, to try a job before it is sent."""


class RayConfig(Section):
    """Actors of a Ray cluster (engine ray, extra `ray`)."""

    address: str = "auto"
    """Of the cluster; auto: RAY_ADDRESS, or the one this machine belongs to."""
    cpus: float = Field(1.0, ge=0)
    """Of each process."""
    gpus: float = Field(0.0, ge=0)
    """Of each process."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "SPREAD"
    """How processes are placed: on few machines, on many, on one, each on its own."""


class KubernetesConfig(Section):
    """A JobSet (engine k8s)."""

    image: str | None = None
    """Container image with meshwright in it; needed by engine k8s."""
    namespace: str = "default"
    """Where the JobSet lives."""
    gpus: int = Field(0, ge=0)
    """nvidia.com/gpu of each process."""
    cpu: str | None = None
    """Cores of each process, as Kubernetes writes them; null: not asked for."""
    memory: str | None = None
    """Of each process, as 64Gi; null: not asked for."""
    claim: str | None = None
    """PersistentVolumeClaim (ReadWriteMany) for runs/ and the cache; needed by engine k8s."""
    mount: str = "/work"
    """Where the claim is mounted, and what processes run in."""
    queue: str | None = None
    """Kueue's local queue, which admits all pods or none; null: no queue."""
    node_selector: dict[str, str] = {}
    """Labels a node must have."""
    service_account: str | None = None
    """Of the pods; null: the namespace's default."""
    restarts: int = Field(3, ge=0)
    """How often the whole JobSet starts again when its supervisor has failed."""


class LaunchConfig(Section):
    """Several processes (`meshwright launch`)."""

    processes: int = Field(1, ge=1)
    """Processes of the run."""
    hosts: int | None = Field(None, ge=1)
    """Hosts they are spread over, in order, each with snapshots and a keeper of its own; engine local simulates them.
    null: one with engine local, launch.slurm.nodes with slurm, elsewhere each process has its own."""
    devices_per_process: int | None = Field(None, ge=1)
    """Simulated devices of each; null: mesh.devices / processes."""
    coordinator: str | None = None
    """host:port of process 0 (engine local); null: chosen by the launcher, or read from the environment or SLURM."""
    listen: str | None = Field(None, pattern=r"^[^:\s]+:\d{1,5}$")
    """host:port at which the machines reach the launcher (engine agents); null: this machine's name, any port."""
    slurm: SlurmConfig = SlurmConfig()
    """What engine slurm asks the cluster for."""
    ray: RayConfig = RayConfig()
    """What engine ray asks the cluster for."""
    k8s: KubernetesConfig = KubernetesConfig()
    """What engine k8s writes into its JobSet."""
