"""How an island's job joins the others: its office opened, its settings compared, its place taken."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import jax

from ...configs.errors import UserError
from ...configs.run import RunConfig
from ...configs.sections.islands import IslandsConfig
from ...parallel.transport.payload_server import Office, Settings
from ...parallel.transport.throttle import Throttle
from ..core.event_log import Journal
from ..engine.island_replica import description, fingerprint
from ..engine.program import Program
from .membership import Group
from .sync import Correspondence, Meetings


@contextmanager
def joined(
    config: RunConfig,
    program: Program,
    journal: Journal,
    *,
    corpus: str,
    alive: Callable[[str], None],
    stop: Callable[[int], bool],
) -> Iterator[Meetings]:
    """The meetings of the island of `config`, a member until the end. `corpus` is the data's fingerprint.

    `alive` is told what is waited for, `stop` asked whether to wait no more: see Meetings.

    Raises UserError where the others are of another run, or nobody answers at `islands.meet`.
    """
    with ExitStack() as stack:
        mail = None
        found: list[Meetings] = []
        if jax.process_index() == 0:
            wanted: set[str] = set()
            office = opened_office(config, description(config, corpus=corpus), wanted)
            stack.callback(office.close)
            group = joined_group(office, program.config.islands, lambda name, payload: found[0].problem(name, payload))
            stack.callback(group.leave)
            group.check_same_run()
            mail = Correspondence(group, office.counters, office.publish, wanted, lambda: office.giving > 0)
        found.append(Meetings(program, mail, journal, alive=alive, stop=stop))
        yield stack.enter_context(closing(found[0]))


def opened_office(config: RunConfig, common: dict[str, Any], wanted: set[str]) -> Office:
    """The office of the island of `config`; keys of states that others ask for are put in `wanted`."""
    islands = config.islands
    settings = Settings(
        timeout=islands.timeout,
        hold=min(islands.timeout, islands.patience) / 2,
        retries=islands.retries,
        throttle=Throttle(bandwidth=islands.bandwidth, latency=islands.latency),
    )
    port = int(islands.address.rpartition(":")[2]) if islands.address else 0
    try:
        return Office(
            f"island-{islands.number}",
            fingerprint=fingerprint(common),
            description=common,
            settings=settings,
            host="0.0.0.0" if islands.address else own_host(islands.meet),
            port=port,
            wanted=lambda key: wanted.add(key) if key.startswith("state ") else None,
        )
    except OSError as error:
        raise UserError(f"islands.address: {islands.address}: cannot listen there: {error.strerror}") from error


def joined_group(office: Office, islands: IslandsConfig, problem: Callable[[str, bytes], str | None]) -> Group:
    """The group, joined. Raises UserError where nobody answers."""
    address = islands.address or f"{own_host(islands.meet)}:{office.port}"
    try:
        return Group(office, islands, address=address, problem=problem)
    except OSError as error:
        raise UserError(
            f"islands.meet: nobody answers at {islands.meet} ({error}); start `meshwright rendezvous` there"
        ) from error


def own_host(meet: str) -> str:
    """This machine's address on the way to host:port `meet`. Raises UserError where there is no way."""
    host, _, port = meet.rpartition(":")
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))  # sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise UserError(f"islands.meet: {meet}: no way there from here: {error}") from error
