"""Processes of one run on this machine, with gloo between them. JAX-free.

A process of its own hosts JAX's coordination service: where it lives in process 0, the death of that one is the death
of all.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence

from ..core import process_env

COORDINATOR_HOST = [sys.executable, "-m", "meshwright.train.launch.coordination_service"]


class LocalEngine:
    """`command` in `processes` processes; the first one's output is shown. `rendezvous` is where they report.

    `host_of`: the number of the host that a slot is on, where keepers look after it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        processes: int,
        rendezvous: str,
        devices_per_process: int | None = None,
        coordinator: str | None = None,
        host_of: Callable[[int], int | None] = lambda slot: None,
    ) -> None:
        self.processes = self._room = processes
        self._command, self._coordinator, self._rendezvous = list(command), coordinator, rendezvous
        self._devices = {process_env.DEVICES: str(devices_per_process)} if devices_per_process else {}
        self._host_of = host_of
        self._running: list[subprocess.Popen] = []
        self._host: subprocess.Popen | None = None

    def slots(self) -> Sequence[int]:
        """One machine has room for as many as were asked for."""
        return range(self._room)

    def gather(self, slots: Collection[int]) -> None:
        """They are all here."""

    def start(self, epoch: int, *, slots: Sequence[int], words: Sequence[str]) -> None:
        """Start the coordination service on a port of this epoch's, and every process."""
        self.processes, command = len(slots), [*self._command, *words]
        address = self._coordinator or f"127.0.0.1:{free_port()}"
        shared = os.environ | self._devices | {
            process_env.COORDINATOR: address,
            process_env.COUNT: str(self.processes),
            process_env.EPOCH: str(epoch),
            process_env.RENDEZVOUS: self._rendezvous,
            process_env.COORDINATED: "outside",
        }  # fmt: skip
        if self.processes > 1:
            self._host = spawn([*COORDINATOR_HOST, address, str(self.processes)], os.environ)
        self._running = [
            spawn(command, shared | {process_env.NUMBER: str(number)} | self._seat(slot), quiet=number > 0)
            for number, slot in enumerate(slots)
        ]

    def _seat(self, slot: int) -> dict[str, str]:
        return process_env.seat(slot, host=self._host_of(slot))

    def poll(self, number: int) -> int | None:
        """Exit code of a process; None while it runs."""
        return self._running[number].poll()

    def broken(self) -> str | None:
        """Whether the coordination service died."""
        code = self._host.poll() if self._host is not None else None
        return None if code is None else f"the coordination service ended with exit code {code}"

    def ask_to_stop(self) -> None:
        """SIGTERM to all that run: they save and exit."""
        for process in self._running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the process groups of all that are left, stopped ones too."""
        for process in [*self._running, *([self._host] if self._host else [])]:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and so has all that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._host = None


def spawn(command: Sequence[str], environment: Mapping[str, str], *, quiet: bool = False) -> subprocess.Popen:
    """A process in a session of its own: Ctrl-C reaches it only through the supervisor; it is killed with its own."""
    return subprocess.Popen(
        list(command),
        env=dict(environment),
        stdout=subprocess.DEVNULL if quiet else None,
        start_new_session=True,
    )


def free_port() -> int:
    """A TCP port nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
