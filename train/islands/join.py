"""How the job of an island joins the others: payload server, membership, and the comparison of settings."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import jax

from ...configs.errors import UserError
from ...configs.run import RunConfig
from ...configs.sections.islands import IslandsConfig
from ...parallel.transport.payload_server import PayloadServer, ServerSettings
from ...parallel.transport.throttle import Throttle
from ..core.event_log import EventLog
from ..engine.island_replica import fingerprint, shared_settings
from ..engine.program import Program
from .island_group import FindProblem, IslandGroup
from .sync import IslandSync, IslandTransport


@contextmanager
def join_islands(
    config: RunConfig, program: Program, event_log: EventLog, *, corpus: str,
    report_waiting: Callable[[str], None], should_stop: Callable[[int], bool],
) -> Iterator[IslandSync]:  # fmt: skip
    """Join the other islands; give the synchronization of this one in the `with`, and leave at its end.

    `corpus`: fingerprint of the data. `report_waiting`, `should_stop`: see `IslandSync`. Raises UserError if the other
    islands belong to another run, or if nobody answers at `islands.meet`.
    """
    with ExitStack() as stack:
        transport = None
        created: list[IslandSync] = []  # the group needs it for received payloads, but is created first
        if jax.process_index() == 0:
            requested_states: set[str] = set()
            server = open_payload_server(config, shared_settings(config, corpus=corpus), requested_states)
            stack.callback(server.close)
            find_problem = lambda name, payload: created[0].find_problem(name, payload)
            group = join_group(server, program.config.islands, find_problem)
            stack.callback(group.leave)
            group.check_same_run()
            is_sending = lambda: server.active_sends > 0
            transport = IslandTransport(group, server.counters, server.publish, requested_states, is_sending)
        created.append(
            IslandSync(program, transport, event_log, report_waiting=report_waiting, should_stop=should_stop)
        )
        yield stack.enter_context(closing(created[0]))


def open_payload_server(config: RunConfig, settings: dict[str, Any], requested_states: set[str]) -> PayloadServer:
    """Open the payload server of the island of `config`. It adds keys of states that others request to the set.

    `settings`: what must be the same in all islands. Raises UserError if it cannot listen at `islands.address`.
    """
    islands = config.islands
    server_settings = ServerSettings(
        timeout=islands.timeout,
        wait_seconds=min(islands.timeout, islands.patience) / 2,
        retries=islands.retries,
        throttle=Throttle(bandwidth=islands.bandwidth, latency=islands.latency),
    )
    port = int(islands.address.rpartition(":")[2]) if islands.address else 0
    try:
        return PayloadServer(
            f"island-{islands.number}",
            fingerprint=fingerprint(settings),
            description=settings,
            settings=server_settings,
            host="0.0.0.0" if islands.address else local_address(islands.meet),
            port=port,
            on_missing=lambda key: requested_states.add(key) if key.startswith("state ") else None,
        )
    except OSError as error:
        raise UserError(
            f"islands.address: cannot listen at {islands.address} ({error.strerror}); choose a free port"
        ) from error


def join_group(server: PayloadServer, islands: IslandsConfig, find_problem: FindProblem) -> IslandGroup:
    """Join the group of islands. Raises UserError if nobody answers at `islands.meet`."""
    address = islands.address or f"{local_address(islands.meet)}:{server.port}"
    try:
        return IslandGroup(server, islands, address=address, find_problem=find_problem)
    except OSError as error:
        raise UserError(
            f"islands.meet: nobody answers at {islands.meet} ({error}); start `meshwright rendezvous` there"
        ) from error


def local_address(meet: str) -> str:
    """Return the address of this machine on the route to host:port `meet`. Raises UserError if there is no route."""
    host, _, port = meet.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(
            f"islands.meet: this machine has no route to {meet} ({error}); check the address and the network"
        ) from error
