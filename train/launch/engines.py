"""Engines by name, and the launch of a run on one of them. JAX-free."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ...configs.elastic import ElasticConfig
from .formations import Formation
from .keepers import Keepers, Plan
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
    keepers: Plan | None = None,
) -> None:
    """Run `command` in `processes` processes on this machine until all end well; see `supervise` for what it raises.

    `directory` is the run's; `formations` are what it may go on as, where fewer processes are left; `keepers` look
    after its snapshots.
    """
    with StopSignals() as stop, Server() as server, ExitStack() as stack:
        engine = LocalEngine(
            command,
            processes=processes,
            rendezvous=server.address,
            devices_per_process=devices_per_process,
            coordinator=coordinator,
        )
        if keepers is not None:
            engine = stack.enter_context(Keepers(keepers, run=directory, server=server)).before(engine)
        supervise(engine, settings=settings, directory=directory, room=server.room, stop=stop, formations=formations)
