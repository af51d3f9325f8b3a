"""Several processes of one run on this machine, with simulated devices and gloo between them. JAX-free.

The launcher starts them, passes on Ctrl-C and SIGTERM, and when one fails ends the others: a process that lost a peer
may wait for it for ever.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

from ...configs.errors import MeshwrightError, Preempted, UserError
from . import world

GRACE = 30.0  # seconds between asking the others to stop and killing them


def launch(
    command: Sequence[str],
    *,
    processes: int,
    devices_per_process: int | None = None,
    coordinator: str | None = None,
    grace: float = GRACE,
) -> None:
    """Run `command` in `processes` processes until all end well; the first one's output is shown.

    `grace`: seconds the others get once one has failed.

    Raises Preempted where all stopped on request, UserError where the request itself was wrong, MeshwrightError where
    one failed.
    """
    environment = os.environ | {
        world.COORDINATOR: coordinator or f"127.0.0.1:{free_port()}",
        world.COUNT: str(processes),
    }
    if devices_per_process:
        environment[world.DEVICES] = str(devices_per_process)
    running = [
        subprocess.Popen(
            list(command),
            env=environment | {world.NUMBER: str(number)},
            stdout=None if number == 0 else subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C reaches them once, from here
        )
        for number in range(processes)
    ]
    before = {
        signum: signal.signal(signum, lambda *_: ask_to_stop(running)) for signum in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        judge(wait(running, grace=grace))
    finally:
        end(running, grace=0)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def wait(running: Sequence[subprocess.Popen], *, grace: float) -> list[int]:
    """Exit codes, once all have ended; where one fails the rest is asked to stop, and killed after `grace` seconds."""
    while True:
        codes = [process.poll() for process in running]
        if None not in codes:
            return codes
        if any(code not in (None, 0, Preempted.exit_code) for code in codes):
            end(running, grace=grace)
        time.sleep(0.1)


def judge(codes: Sequence[int]) -> None:
    """Raise what the exit codes of all processes amount to."""
    if UserError.exit_code in codes:
        raise UserError(f"process {list(codes).index(UserError.exit_code)} refused the configuration (see above)")
    if failed := {number: code for number, code in enumerate(codes) if code not in (0, Preempted.exit_code)}:
        raise MeshwrightError(f"processes failed with these exit codes: {failed}")
    if Preempted.exit_code in codes:
        raise Preempted("stopped on request, state saved; run the same command to go on")


def ask_to_stop(running: Sequence[subprocess.Popen]) -> None:
    """SIGTERM to all that run: they save and exit."""
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)


def end(running: Sequence[subprocess.Popen], *, grace: float) -> None:
    """Ask all to stop, and kill those that have not within `grace` seconds."""
    ask_to_stop(running)
    deadline = time.monotonic() + grace
    for process in running:
        try:
            process.wait(timeout=max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A TCP port nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
