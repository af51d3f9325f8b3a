"""Several islands on this machine: the rendezvous, and a launcher for each, as they would be on machines of their own.

Each island is supervised by itself: one that crashes is started again while the others train on. JAX-free.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...configs.errors import MeshwrightError, Preempted, UserError
from ..core.rendezvous import Room, Server
from ..core.signals import StopSignals
from ..islands.quorum import Arbiter
from .local_processes import spawn

TICK = 0.1  # seconds between two looks


@contextmanager
def meeting_place(host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """A rendezvous for islands: its host:port. Raises UserError where the port is taken."""
    room = Room()
    try:
        server = Server(host, port, room=room, operations=Arbiter(room).operations)
    except OSError as error:
        raise UserError(f"--port: cannot listen at {host}:{port}: {error.strerror}; choose another one") from error
    with server:
        yield server.address


def launch_islands(command: Callable[[int, str], Sequence[str]], *, count: int, directory: Path) -> None:
    """Run `command(number, rendezvous)` for each of `count` islands until all end well.

    What the first one says is shown, the others write to `directory`/launch/island-K.log. Raises Preempted where all
    stopped on request, UserError where one refused its configuration, MeshwrightError where one failed: the others
    trained on to their end.
    """
    with StopSignals() as stop, meeting_place() as address:
        jobs = [started(command(number, address), directory / f"island-{number}", number) for number in range(count)]
        told = False
        try:
            while any(job.poll() is None for job in jobs):
                if (stop.asked and not told) or UserError.exit_code in {job.poll() for job in jobs}:
                    told = True
                    ask_to_stop(jobs)
                time.sleep(TICK)
        finally:
            ask_to_stop(jobs)
            codes = [job.wait() for job in jobs]
    judge(codes, directory)


def started(command: Sequence[str], directory: Path, number: int) -> subprocess.Popen:
    """A launcher of its own; the first one's words are shown."""
    if number == 0:
        return spawn(command, os.environ)
    logs = directory.parent / "launch"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{directory.name}.log").open("ab") as log:
        return subprocess.Popen(list(command), stdout=log, stderr=log, start_new_session=True)


def ask_to_stop(jobs: Sequence[subprocess.Popen]) -> None:
    """SIGTERM to the launchers that run: each saves its island and ends."""
    for job in jobs:
        if job.poll() is None:
            job.send_signal(signal.SIGTERM)


def judge(codes: Sequence[int], directory: Path) -> None:
    """Raise what the exit codes of all islands amount to."""
    told = ", ".join(f"island {number}: {code}" for number, code in enumerate(codes))
    where = f"{directory / 'launch'} and {directory}/island-*/events.jsonl say why"
    if UserError.exit_code in codes:
        raise UserError(f"islands refused the configuration (exit codes {told}); {where}")
    if all(code in (0, Preempted.exit_code) for code in codes):
        if Preempted.exit_code in codes:
            raise Preempted("stopped on request, states saved; run the same command to go on")
        return
    raise MeshwrightError(f"islands failed (exit codes {told}); {where}")
