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

from ...configs.errors import MeshwrightError, Preemption, UserError
from ..core.rendezvous import MembershipStore, Server
from ..core.signals import StopSignals
from ..islands.quorum import QuorumService
from .local_processes import spawn

POLL_SECONDS = 0.1  # between two looks at the launchers


@contextmanager
def serve_rendezvous(host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve a rendezvous for islands; yields its HOST:PORT. Raises UserError where the port is taken."""
    store = MembershipStore()
    try:
        server = Server(host, port, store=store, operations=QuorumService(store).operations)
    except OSError as error:
        raise UserError(f"--port: cannot listen at {host}:{port}: {error.strerror}; choose another one") from error
    with server:
        yield server.address


def supervise_islands(command: Callable[[int, str], Sequence[str]], *, count: int, directory: Path) -> None:
    """Run `command(number, rendezvous)` for each of `count` islands until all end well.

    The output of island 0 is shown, the others write to `directory`/launch/island-K.log. Raises Preemption where all
    stopped on request, UserError where one refused its configuration, MeshwrightError where one failed: the others
    trained on to their end.
    """
    with StopSignals() as stop, serve_rendezvous() as address:
        launchers = [
            start_launcher(command(number, address), directory / f"island-{number}", show_output=number == 0)
            for number in range(count)
        ]
        stopping = False
        try:
            while any(launcher.poll() is None for launcher in launchers):
                refused = UserError.exit_code in {launcher.poll() for launcher in launchers}
                if (stop.requested and not stopping) or refused:
                    stopping = True
                    request_stop(launchers)
                time.sleep(POLL_SECONDS)
        finally:
            request_stop(launchers)
            codes = [launcher.wait() for launcher in launchers]
    raise_for_exit_codes(codes, directory)


def start_launcher(command: Sequence[str], directory: Path, *, show_output: bool) -> subprocess.Popen:
    """Start the launcher of the island in `directory`; its output is shown, or goes to a log."""
    if show_output:
        return spawn(command, os.environ)
    logs = directory.parent / "launch"
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{directory.name}.log").open("ab") as log:
        return subprocess.Popen(list(command), stdout=log, stderr=log, start_new_session=True)


def request_stop(launchers: Sequence[subprocess.Popen]) -> None:
    """Send SIGTERM to the launchers that run: each saves its island and ends."""
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.send_signal(signal.SIGTERM)


def raise_for_exit_codes(codes: Sequence[int], directory: Path) -> None:
    """Raise the error that the exit codes of all islands amount to; see `supervise_islands`."""
    by_island = ", ".join(f"island {number}: {code}" for number, code in enumerate(codes))
    logs = f"{directory / 'launch'} and {directory}/island-*/events.jsonl say why"
    if UserError.exit_code in codes:
        raise UserError(f"islands refused the configuration (exit codes {by_island}); {logs}")
    if not set(codes) <= {0, Preemption.exit_code}:
        raise MeshwrightError(f"islands failed (exit codes {by_island}); {logs}")
    if Preemption.exit_code in codes:
        raise Preemption("stopped on request, states saved; run the same command to go on")
