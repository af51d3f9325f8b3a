"""Engine `slurm`: a batch job, sent by submitit, that supervises itself. JAX-free.

    login node    meshwright launch  ->  submitit: sbatch  ->  prints the job's number and where its logs are
    first node    the batch job's one step: `SupervisorStep`
    every node    srun, started by it  ->  agents  ->  trainers

A restart is inside the allocation. When time runs out (SIGUSR2) or somebody cancels or preempts (SIGTERM), the trainers
save and exit with 75 first; then submitit queues the job again, and it goes on where it was. A node that fails ends the
job, and SLURM itself queues it again.
"""

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from ...configs.errors import MeshwrightError, Preemption, UserError
from ...configs.sections.launch import SlurmConfig
from . import launchers
from .job import Job, import_optional
from .remote_processes import Hosts, run_on_hosts

MARGIN = 60  # seconds of warning beyond elastic.grace: killing, queueing again
# What describes the supervisor's own step, and must not be inherited by the steps that it starts.
STEP_VARIABLES = (
    "SLURM_CPU_BIND", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES", "SLURM_TASKS_PER_NODE", "SLURM_MEM_BIND",
)  # fmt: skip

logger = logging.getLogger(__name__)


def launch(job: Job) -> None:
    """Send the job and print its number; it runs, and returns to the queue, without this process."""
    settings = job.settings.slurm
    check_nodes(settings, processes=job.processes)
    submitit = import_optional("submitit", "slurm")
    folder = job.directory.parent / f"{job.name}-slurm"
    try:
        executor = submitit.AutoExecutor(folder, cluster=settings.executor, slurm_max_num_timeout=settings.requeues)
    except RuntimeError as error:
        raise UserError(
            f"--engine: slurm: {str(error).rstrip('.?')}; run this where sbatch is, or set launch.slurm.executor=local"
        ) from error
    executor.update_parameters(**executor_parameters(settings, name=job.name, grace=job.elastic.grace))
    try:
        submitted = executor.submit(SupervisorStep(job))
    except submitit.core.utils.FailedJobError as error:
        raise MeshwrightError(f"sbatch: {error}") from error
    print(f"job {submitted.job_id}: {job.name}, {job.processes} processes on {settings.nodes} nodes")
    print(f"logs    {submitted.paths.stdout}\n        {submitted.paths.stderr}")
    if settings.executor == "slurm":
        print(f"look    squeue --job {submitted.job_id}\nstop    scancel {submitted.job_id}   (saves first)")
    else:
        submitted.wait()  # submitit's local executor ends with this process
        submitted.result()


def check_nodes(settings: SlurmConfig, *, processes: int) -> None:
    """Raise UserError where nodes do not share the processes evenly, or processes the GPUs of a node."""
    if processes % settings.nodes:
        raise UserError(
            f"launch.slurm.nodes: {processes} processes do not share {settings.nodes} nodes evenly; use a divisor of "
            f"{processes}, or change launch.processes"
        )
    per_node = processes // settings.nodes
    if settings.gpus_per_node is not None and settings.gpus_per_node % per_node:
        raise UserError(
            f"launch.slurm.gpus_per_node: {per_node} processes do not share {settings.gpus_per_node} GPUs of a node "
            f"evenly; launch a divisor of {settings.gpus_per_node} on each"
        )
    if settings.gres is not None and per_node > 1:
        raise UserError(
            f"launch.slurm.gres: {settings.gres} is a node's, and would be given to each of {per_node} processes; "
            "launch one process on a node, or use launch.slurm.gpus_per_node"
        )
    if settings.executor == "local" and settings.nodes > 1:
        raise UserError(f"launch.slurm.nodes: {settings.nodes} with executor local, which is one machine; use 1")


def executor_parameters(settings: SlurmConfig, *, name: str, grace: float) -> dict[str, Any]:
    """Parameters of submitit's executor: the batch job is one step of one task on the first node, the supervisor."""
    parameters = {
        "name": name,
        "timeout_min": settings.time,
        "nodes": settings.nodes,
        "gpus_per_node": settings.gpus_per_node,
        "cpus_per_task": settings.cpus_per_task,
        "mem_gb": settings.memory,
    }
    if settings.executor == "slurm":
        parameters |= {
            "slurm_partition": settings.partition,
            "slurm_account": settings.account,
            "slurm_qos": settings.qos,
            "slurm_constraint": settings.constraint,
            "slurm_gres": settings.gres,
            "slurm_setup": settings.setup or None,
            "slurm_signal_delay_s": math.ceil(grace) + MARGIN,
            "slurm_srun_args": ["--nodes=1", "--ntasks=1", "--overlap"],
            "slurm_additional_parameters": {"requeue": True},
        }
    return {name: value for name, value in parameters.items() if value is not None}


class SignalledStop:
    """A request to stop that comes from submitit's signals."""

    requested = False


class SupervisorStep:
    """What the batch job runs. submitit calls it, and `checkpoint` when the job must go."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self) -> None:
        """Supervise in a thread, so that signals are answered meanwhile. Exits with 75 where asked to stop."""
        self._stop, self._error = SignalledStop(), None
        self._thread = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        signal.signal(signal.SIGTERM, self._request_stop)  # submitit does not handle it
        self._thread.start()
        while self._thread.is_alive():
            self._thread.join(0.2)
        if self._error is not None:
            print(f"meshwright: {self._error}", file=sys.stderr)
            if isinstance(self._error, Preemption):
                sys.exit(Preemption.exit_code)
            raise self._error

    def checkpoint(self) -> Any:
        """Stop, the state saved, and return what is to be queued again."""
        import submitit

        self._request_stop()
        self._thread.join(self.job.elastic.grace + MARGIN / 2)
        return submitit.helpers.DelayedSubmission(SupervisorStep(self.job))

    def _request_stop(self, *_: object) -> None:
        self._stop.requested = True

    def _supervise(self) -> None:
        try:
            if "SLURM_JOB_ID" in os.environ:
                hosts = SlurmHosts(self.job.settings.slurm, processes=self.job.processes)
                run_on_hosts(hosts, self.job, stop=self._stop)
            else:
                launchers.launch_local(self.job, stop=self._stop)
        except BaseException as error:
            self._error = error


class SlurmHosts(Hosts):
    """Agents as steps of the allocation that this process is in: one step for all, or one for each that was lost."""

    def __init__(self, settings: SlurmConfig, *, processes: int) -> None:
        self.name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._settings, self._processes = settings, processes
        self._steps: list[subprocess.Popen] = []

    def start(self, machines: Mapping[int, str], port: int) -> None:
        """Start agents by srun, in one step where all are missing."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(STEP_VARIABLES)}
        agent = [sys.executable, "-m", "meshwright.train.launch.agent", f"{self.name}:{port}"]
        if len(machines) == self._processes:
            self.close()
            commands = [[*self.srun_command(self._settings.nodes, self._processes), *agent]]
        else:
            commands = [
                [*self.srun_command(1, 1), f"--nodelist={machine}", *agent, str(slot)]
                for slot, machine in machines.items()
            ]
        self._steps = [step for step in self._steps if step.poll() is None]
        self._steps += [subprocess.Popen(command, env=environment) for command in commands]

    def srun_command(self, nodes: int, tasks: int) -> list[str]:
        """The beginning of the command of a step with `tasks` agents on `nodes` nodes."""
        settings, per_node = self._settings, self._processes // self._settings.nodes
        command = ["srun", "--overlap", "--kill-on-bad-exit=0", "--wait=0", f"--nodes={nodes}", f"--ntasks={tasks}"]
        command += [f"--ntasks-per-node={tasks // nodes}", "--distribution=block"]  # as launch.hosts counts them
        if settings.cpus_per_task is not None:
            command.append(f"--cpus-per-task={settings.cpus_per_task}")
        if settings.gres is not None:
            command.append(f"--gres={settings.gres}")
        if settings.gpus_per_node is not None:
            command.append(f"--gpus-per-task={settings.gpus_per_node // per_node}")
        return command

    def failure(self) -> str | None:
        """How a step failed while agents are awaited."""
        codes = [code for step in self._steps if (code := step.poll())]
        return f"srun ended with exit code {codes[0]}" if codes else None

    def hint(self) -> str:
        """What a reader can do."""
        return "; is the partition busy, or a node down? see squeue --steps"

    def close(self) -> None:
        """End the steps: SIGTERM to srun reaches the agents; what is left then, SLURM kills with the job."""
        for step in self._steps:
            if step.poll() is None:
                try:
                    step.wait(5)
                except subprocess.TimeoutExpired:
                    step.terminate()
        self._steps = []
