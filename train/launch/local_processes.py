"""The processes of one run on this machine, which compute together by gloo. JAX-free.

JAX's coordination service has a process of its own here: inside process 0, its death would be the death of all.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence

from .job import Job

COORDINATION_SERVICE = [sys.executable, "-m", "meshwright.train.launch.coordination_service"]


class LocalEngine:
    """Runs a job's processes on this machine; the output of the first one is shown.

    `rendezvous` is the HOST:PORT to which they report.
    """

    def __init__(self, job: Job, *, rendezvous: str) -> None:
        self._job, self._rendezvous = job, rendezvous
        self.processes = job.processes
        self._running: list[subprocess.Popen] = []
        self._service: subprocess.Popen | None = None  # the coordination service

    def available_slots(self) -> Sequence[int]:
        """One machine has as many slots as there were processes at first."""
        return range(self._job.processes)

    def acquire(self, slots: Collection[int]) -> None:
        """They are all here."""

    def start(self, epoch: int, *, slots: Sequence[int], overrides: Sequence[str]) -> None:
        """Start the coordination service, on a new port by default, and a process in each slot."""
        self.processes, command = len(slots), [*self._job.command, *overrides]
        address = self._job.settings.coordinator or f"127.0.0.1:{free_port()}"
        self._service = start_coordination_service(address, self.processes)
        for index, slot in enumerate(slots):
            info = self._job.process_info(
                index, slot, len(slots), epoch, coordinator=address, rendezvous=self._rendezvous
            )
            self._running.append(spawn(command, os.environ | info.to_environment(), quiet=index > 0))

    def poll(self, index: int) -> int | None:
        """Exit code of a process; None while it runs."""
        return self._running[index].poll()

    def service_failure(self) -> str | None:
        """How the coordination service ended; None while it runs."""
        return describe_end(self._service)

    def request_stop(self) -> None:
        """Send SIGTERM to all that run: they save and exit."""
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL to the process groups of all that are left, stopped ones too."""
        kill_groups([*self._running, self._service])
        self._running, self._service = [], None


def start_coordination_service(address: str, processes: int) -> subprocess.Popen | None:
    """Start the host of JAX's coordination service at `address` (HOST:PORT); None for one process, which needs none."""
    return spawn([*COORDINATION_SERVICE, address, str(processes)], os.environ) if processes > 1 else None


def describe_end(service: subprocess.Popen | None) -> str | None:
    """How a coordination service ended; None while it runs, and where there is none."""
    code = service.poll() if service is not None else None
    return None if code is None else f"the coordination service ended with exit code {code}"


def spawn(command: Sequence[str], environment: Mapping[str, str], *, quiet: bool = False) -> subprocess.Popen:
    """Start a process in a session of its own: Ctrl-C reaches it only through the supervisor.

    Its children are in its process group, and are killed with it. `quiet` drops its standard output.
    """
    return subprocess.Popen(
        list(command),
        env=dict(environment),
        stdout=subprocess.DEVNULL if quiet else None,
        start_new_session=True,
    )


def kill_groups(processes: Sequence[subprocess.Popen | None]) -> None:
    """Send SIGKILL to the groups of processes that `spawn` started, and wait for their end."""
    for process in processes:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and so has all that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """A TCP port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
