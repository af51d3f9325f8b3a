"""How an island's job joins the others: its office opened, its settings compared, its place taken."""

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
from ..core.event_log import Journal
from ..engine.island_replica import fingerprint, shared_settings
from ..engine.program import Program
from .membership import IslandGroup
from .sync import IslandSync, IslandTransport


@contextmanager
def join_islands(
    config: RunConfig,
    program: Program,
    journal: Journal,
    *,
    corpus: str,
    report_waiting: Callable[[str], None],
    should_stop: Callable[[int], bool],
) -> Iterator[IslandSync]:
    """The meetings of the island of `config`, a member until the end. `corpus` is the data's fingerprint.

    `alive` is told what is waited for, `stop` asked whether to wait no more: see Meetings.

    Raises UserError where the others are of another run, or nobody answers at `islands.meet`.
    """
    with ExitStack() as stack:
        mail = None
        found: list[IslandSync] = []
        if jax.process_index() == 0:
            wanted: set[str] = set()
            office = open_payload_server(config, shared_settings(config, corpus=corpus), wanted)
            stack.callback(office.close)
            group = join_group(
                office, program.config.islands, lambda name, payload: found[0].find_problem(name, payload)
            )
            stack.callback(group.leave)
            group.check_same_run()
            mail = IslandTransport(group, office.counters, office.publish, wanted, lambda: office.active_sends > 0)
        found.append(IslandSync(program, mail, journal, report_waiting=report_waiting, should_stop=should_stop))
        yield stack.enter_context(closing(found[0]))


def open_payload_server(config: RunConfig, common: dict[str, Any], wanted: set[str]) -> PayloadServer:
    """The office of the island of `config`; keys of states that others ask for are put in `wanted`."""
    islands = config.islands
    settings = ServerSettings(
        timeout=islands.timeout,
        wait_seconds=min(islands.timeout, islands.patience) / 2,
        retries=islands.retries,
        throttle=Throttle(bandwidth=islands.bandwidth, latency=islands.latency),
    )
    port = int(islands.address.rpartition(":")[2]) if islands.address else 0
    try:
        return PayloadServer(
            f"island-{islands.number}",
            fingerprint=fingerprint(common),
            description=common,
            settings=settings,
            host="0.0.0.0" if islands.address else local_address(islands.meet),
            port=port,
            on_missing=lambda key: wanted.add(key) if key.startswith("state ") else None,
        )
    except OSError as error:
        raise UserError(f"islands.address: {islands.address}: cannot listen there: {error.strerror}") from error


def join_group(
    office: PayloadServer, islands: IslandsConfig, problem: Callable[[str, bytes], str | None]
) -> IslandGroup:
    """The group, joined. Raises UserError where nobody answers."""
    address = islands.address or f"{local_address(islands.meet)}:{office.port}"
    try:
        return IslandGroup(office, islands, address=address, find_problem=problem)
    except OSError as error:
        raise UserError(
            f"islands.meet: nobody answers at {islands.meet} ({error}); start `meshwright rendezvous` there"
        ) from error


def local_address(meet: str) -> str:
    """This machine's address on the way to host:port `meet`. Raises UserError where there is no way."""
    host, _, port = meet.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"islands.meet: {meet}: no way there from here: {error}") from error
