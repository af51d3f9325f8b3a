"""Engines by name, and the launch of a run on one of them. JAX-free."""

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from ...configs.elastic import ElasticConfig
from .local import LocalEngine
from .rendezvous import Server
from .supervisor import supervise

ENGINES = {"local": LocalEngine}


class StopSignals:
    """SIGTERM and Ctrl-C as a request: `asked`. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {signum: signal.signal(signum, self._ask) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


def launch(
    command: Sequence[str],
    *,
    processes: int,
    directory: Path,
    settings: ElasticConfig,
    devices_per_process: int | None = None,
    coordinator: str | None = None,
) -> None:
    """Run `command` in `processes` processes on this machine until all end well; see `supervise` for what it raises.

    `directory` is the run's.
    """
    with StopSignals() as stop, Server() as server:
        engine = LocalEngine(
            command,
            processes=processes,
            rendezvous=server.address,
            devices_per_process=devices_per_process,
            coordinator=coordinator,
        )
        supervise(engine, settings=settings, directory=directory, room=server.room, stop=stop)
