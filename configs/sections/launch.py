"""The section launch: where `meshwright launch` runs its processes (this machine, SLURM, Ray, Kubernetes)."""

from typing import Literal

from pydantic import Field

from .base import Section


class SlurmConfig(Section):
    """The job that `--engine slurm` submits (install the extra `slurm`)."""

    partition: str | None = None
    """SLURM partition; null: the cluster's default."""
    account: str | None = None
    """SLURM account that is charged; null: the user's default."""
    qos: str | None = None
    """SLURM quality of service; null: the cluster's default."""
    time: int = Field(60, ge=1)
    """Time limit of the job, in minutes; before it ends the state is saved, and the job is queued again."""
    nodes: int = Field(1, ge=1)
    """Nodes of the job; launch.processes must be a multiple of it."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs of each node, divided among its processes; null: none is requested."""
    gres: str | None = None
    """Other generic resources of each node, as `sbatch --gres` takes them, e.g. gpu:mi300x:8; null: none."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPU cores of each process; null: the cluster's default."""
    memory: int | None = Field(None, ge=1)
    """Memory of each node, in GB; null: the cluster's default."""
    constraint: str | None = None
    """Features that a node must have, as `sbatch --constraint` takes them; null: none."""
    requeues: int = Field(100, ge=0)
    """How many times a job that reached its time limit is queued again."""
    setup: list[str] = []
    """Shell commands before the run, e.g. `module load cuda`; []: none."""
    executor: Literal["slurm", "local"] = "slurm"
    """slurm submits the job; local runs it with submitit on this machine, to test it before."""


class RayConfig(Section):
    """The actors of `--engine ray` (install the extra `ray`)."""

    address: str = "auto"
    """Address of the Ray cluster; auto: $RAY_ADDRESS, else the cluster that this machine belongs to."""
    cpus: float = Field(1.0, ge=0)
    """CPU cores of each process."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of each process."""
    resources: dict[str, float] = {}
    """Other Ray resources of each process, e.g. {TPU: 4}; {}: none."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "SPREAD"
    """Placement of processes: PACK on few nodes, SPREAD over many, STRICT_PACK on one, STRICT_SPREAD one a node."""


class KubernetesConfig(Section):
    """The JobSet that `--engine k8s` writes."""

    image: str | None = None
    """Container image with meshwright installed; `--engine k8s` needs one."""
    namespace: str = "default"
    """Kubernetes namespace of the JobSet."""
    gpus: int = Field(0, ge=0)
    """GPUs (nvidia.com/gpu) of each process; 0: none is requested."""
    target: str | None = None
    """Devices of the whole job, as `plan --target` takes them, e.g. v5p:4x4x4: chooses nodes of that TPU slice, or GPUs
    of that maker; null: what `gpus` and `node_selector` say."""
    cpu: str | None = None
    """CPU cores of each process as a Kubernetes quantity, e.g. 500m; null: none is requested."""
    memory: str | None = None
    """Memory of each process as a Kubernetes quantity, e.g. 64Gi; null: none is requested."""
    claim: str | None = None
    """PersistentVolumeClaim (ReadWriteMany) for runs/ and the cache; `--engine k8s` needs one."""
    mount: str = "/work"
    """Directory at which the claim is mounted; the processes' working directory."""
    queue: str | None = None
    """Local queue of Kueue, which admits all pods or none; null: no queue."""
    node_selector: dict[str, str] = {}
    """Labels that a node must have; {}: none."""
    service_account: str | None = None
    """Service account of the pods; null: the namespace's default."""
    restarts: int = Field(3, ge=0)
    """How many times the whole JobSet is restarted after its supervisor has failed."""


class LaunchConfig(Section):
    """A run of several processes (`meshwright launch`)."""

    processes: int = Field(1, ge=1)
    """How many processes the run has."""
    hosts: int | None = Field(None, ge=1)
    """Hosts that the processes are divided over, in order; each has a snapshot agent. `--engine local` simulates them.
    null: 1 with engine local, launch.slurm.nodes with slurm, one host a process elsewhere."""
    devices_per_process: int | None = Field(None, ge=1)
    """Simulated devices of each process; null: mesh.devices / processes."""
    coordinator: str | None = None
    """host:port of JAX's coordination service (engine local); null: chosen by the launcher, or read from the
    environment or SLURM."""
    listen: str | None = Field(None, pattern=r"^[^:\s]+:\d{1,5}$")
    """host:port at which agents reach the launcher (engine agents); null: this machine's name and a free port."""
    slurm: SlurmConfig = SlurmConfig()
    """Settings of engine slurm."""
    ray: RayConfig = RayConfig()
    """Settings of engine ray."""
    k8s: KubernetesConfig = KubernetesConfig()
    """Settings of engine k8s."""
