"""Engines by name, and the launch of a run on one of them. JAX-free."""

from collections.abc import Sequence
from pathlib import Path

from ...configs.elastic import ElasticConfig
from .formations import Formation
from .local import LocalEngine
from .rendezvous import Server
from .signals import StopSignals
from .supervisor import supervise

ENGINES = {"local": LocalEngine}


def launch(
    command: Sequence[str],
    *,
    processes: int,
    directory: Path,
    settings: ElasticConfig,
    devices_per_process: int | None = None,
    coordinator: str | None = None,
    formations: Sequence[Formation] = (),
) -> None:
    """Run `command` in `processes` processes on this machine until all end well; see `supervise` for what it raises.

    `directory` is the run's; `formations` are what it may go on as, where fewer processes are left.
    """
    with StopSignals() as stop, Server() as server:
        engine = LocalEngine(
            command,
            processes=processes,
            rendezvous=server.address,
            devices_per_process=devices_per_process,
            coordinator=coordinator,
        )
        supervise(engine, settings=settings, directory=directory, room=server.room, stop=stop, formations=formations)
