"""Measures the links between machines, pair by pair with plain sockets: delay, bandwidth, and difference of clocks.

Every machine measures every other once each way, in the rounds of a tournament, so that no two measurements share a
machine. Results are collected through a membership store.

    measure_links(session="1", rendezvous="node0:4000", number=2, processes=4)   on every machine, about the same time
    links = collect_links(store, session="1", processes=4)                       beside the membership store
    find_link_faults(links)   ->   [LinkFault((2,), ...)] a machine all of whose links are slow, or a pair (0, 3)

Source: the delay matrix of C4 (arXiv:2406.04594); what is slow in a whole row and column is the machine, not a link.
"""

import ipaddress
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...parallel.outer.matchings import matchings
from ..core.rendezvous import Client, MembershipStore
from .agent_server import accept_connections

PING_BYTES, PINGS = 64, 20  # size and number of the messages that measure delay; the quickest counts
BURST_BYTES, BURSTS = 4 << 20, 3  # of those that measure bandwidth
BURST_SECONDS = 0.5  # after which a slow link has been measured well enough
PARTNER_TIMEOUT = 20.0  # seconds to wait for a partner
MAX_ROUNDS = 63  # among many machines each measures this many others
SLOW_FACTOR = 5.0  # a link is slow with so many times the median delay, or that part of the median bandwidth
SAME_CAUSE_FACTOR = 4.0  # links within this factor of the slowest are slow for one reason
MIN_EXTRA_DELAY = 1e-3  # seconds of delay beyond the median that matter
LENGTH_HEADER = struct.Struct("!Q")  # bytes that follow
CLOCK_REPLY = struct.Struct("!d")  # the answer: the other's clock, seconds since 1970

Dial = Callable[[tuple[str, int], float], socket.socket]
LinkMeasurement = tuple[float, float, float]  # delay, bandwidth, offset: see Links


@dataclass(frozen=True)
class Links:
    """Matrices [from, to], float64; NaN where nothing was measured, infinite delay where no connection came about."""

    delay: np.ndarray  # seconds for a small message and its answer
    bandwidth: np.ndarray  # bytes a second
    offset: np.ndarray  # seconds by which the other's clock is ahead

    @property
    def measured(self) -> np.ndarray:
        """[from, to], bool: whether the link has a delay and a bandwidth."""
        return np.isfinite(self.delay) & (self.bandwidth > 0)


@dataclass(frozen=True)
class LinkFault:
    """Slow links of one machine, or the slow link between two: (process,) or (process, process)."""

    processes: tuple[int, ...]
    evidence: str


class EchoServer:
    """Answers every message with the time. `with EchoServer() as server: server.port`."""

    def __enter__(self) -> "EchoServer":
        self._listener = socket.create_server(("", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="echo", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        for peer in accept_connections(self._listener):
            threading.Thread(target=answer_messages, args=(peer,), daemon=True).start()


def answer_messages(peer: socket.socket) -> None:
    """Receive messages of the lengths they announce, and answer each with the time, until the peer hangs up."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(1 << 20))
    with peer:
        try:
            while header := peer.recv(LENGTH_HEADER.size, socket.MSG_WAITALL):
                (remaining,) = LENGTH_HEADER.unpack(header)
                while remaining > 0:
                    if not (received := peer.recv_into(buffer[: min(remaining, len(buffer))])):
                        return
                    remaining -= received
                peer.sendall(CLOCK_REPLY.pack(time.time()))
        except (OSError, struct.error):
            return  # the peer is gone


def measure_link(address: tuple[str, int], *, dial: Dial = socket.create_connection) -> LinkMeasurement:
    """(delay, bandwidth, offset) to an `EchoServer`; infinite delay where it cannot be reached."""
    try:
        with dial(address, 3.0) as connection:
            connection.settimeout(PARTNER_TIMEOUT)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            delay, offset = min(send_and_wait(connection, PING_BYTES) for _ in range(PINGS))
            burst, began = math.inf, time.monotonic()
            for _ in range(BURSTS):
                burst = min(burst, send_and_wait(connection, BURST_BYTES)[0])
                if time.monotonic() - began > BURST_SECONDS:
                    break
            return delay, BURST_BYTES / max(burst - delay, 1e-9), offset
    except (OSError, struct.error):
        return math.inf, 0.0, math.nan


def send_and_wait(connection: socket.socket, size: int) -> tuple[float, float]:
    """(seconds until a message of `size` bytes was answered, seconds by which the other's clock is ahead)."""
    sent_at, began = time.time(), time.monotonic()
    connection.sendall(LENGTH_HEADER.pack(size) + bytes(size))
    (peer_clock,) = CLOCK_REPLY.unpack(connection.recv(CLOCK_REPLY.size, socket.MSG_WAITALL))
    elapsed = time.monotonic() - began
    return elapsed, peer_clock - (sent_at + elapsed / 2)


def measure_links(
    *, session: str, rendezvous: str, number: int, processes: int, dial: Dial = socket.create_connection
) -> None:
    """Measure the links of this machine, process `number`, and publish them in the membership store of `rendezvous`.

    Ends early where another machine does not come.
    """
    with EchoServer() as server, Client(rendezvous, member_name(session, number), ttl=600.0) as client:
        measurements: dict[str, list[float | None]] = {}
        client.join({"address": [own_address(rendezvous), server.port], "met": -1, "found": measurements})
        for round_number, partners in enumerate(matchings(processes)[:MAX_ROUNDS]):
            partner = int(partners[number])
            if partner != number:
                address = wait_for_partner(client, member_name(session, partner), round_number)
                if address is None:
                    break
                values = measure_link((address[0], int(address[1])), dial=dial)
                measurements[str(partner)] = [value if math.isfinite(value) else None for value in values]  # for JSON
            client.heartbeat({"met": round_number, "found": measurements})
        client.heartbeat({"done": True})
        time.sleep(2.0)  # a slower partner may still be measuring


def member_name(session: str, number: int) -> str:
    """The name of a machine that takes part, in the membership store."""
    return f"links/{session}/{number}"


def own_address(rendezvous: str) -> str:
    """The address by which others reach this machine, given that it reaches `rendezvous` (HOST:PORT)."""
    host, _, port = rendezvous.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        return reachable_name(connection, dialled=rendezvous)


def reachable_name(connection: socket.socket, *, dialled: str) -> str:
    """The name by which others reach this machine, told from its connection to `dialled` (HOST:PORT).

    A connection by loopback is to this machine itself, and HOST is what the others call it.
    """
    address = connection.getsockname()[0]
    return dialled.rpartition(":")[0] if ipaddress.ip_address(address).is_loopback else address


def wait_for_partner(client: Client, partner: str, round_number: int) -> list | None:
    """The address of a partner once it is done with earlier rounds; None where it does not come in time."""
    deadline = time.monotonic() + PARTNER_TIMEOUT
    while time.monotonic() < deadline:
        info = client.heartbeat()["members"].get(partner)
        if info is not None and info["met"] >= round_number - 1:
            return info["address"]
        time.sleep(0.01)
    return None


def collect_links(
    store: MembershipStore, *, session: str, processes: int, timeout: float = 2 * PARTNER_TIMEOUT
) -> Links:
    """What all who took part measured, once they are done or `timeout` seconds are over."""
    deadline = time.monotonic() + timeout
    while True:
        members = store.membership.members
        infos = {n: members[name].info for n in range(processes) if (name := member_name(session, n)) in members}
        if sum("done" in info for info in infos.values()) == processes or time.monotonic() > deadline:
            return assemble_links(infos, processes=processes)
        time.sleep(0.02)


def assemble_links(infos: Mapping[int, Mapping[str, Any]], *, processes: int) -> Links:
    """The matrices of what each process measured; `infos` is what each published, by process."""
    matrices = np.full((3, processes, processes), np.nan)
    for row, info in infos.items():
        for column, (delay, bandwidth, offset) in info.get("found", {}).items():
            values = [math.inf if delay is None else delay, bandwidth, offset]
            matrices[:, row, int(column)] = [math.nan if value is None else value for value in values]
    return Links(*matrices)


def slowdowns(links: Links) -> np.ndarray:
    """How many times slower than the median link each is, the slower direction; [N, N], NaN where not measured."""
    measured = links.measured
    if not measured.any():
        return np.full(links.delay.shape, np.nan)
    delay, bandwidth = np.median(links.delay[measured]), np.median(links.bandwidth[measured])
    by_delay = np.where(links.delay > delay + MIN_EXTRA_DELAY, links.delay / delay, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.fmax(by_delay, bandwidth / links.bandwidth)
    ratio[np.isnan(links.delay)] = np.nan
    return np.fmax(ratio, ratio.T)


def find_link_faults(links: Links) -> list[LinkFault]:
    """What explains the slowest links, worst first: a machine most of whose links are as slow, else the pair.

    Of two machines none is blamed: there is no third to compare with.
    """
    ratio = slowdowns(links)
    count = len(ratio)
    slow = {(a, b): ratio[a, b] for a in range(count) for b in range(a + 1, count) if ratio[a, b] > SLOW_FACTOR}
    faults = []
    while slow:
        worst = max(slow, key=lambda pair: slow[pair])
        same_cause = [pair for pair in slow if slow[pair] >= slow[worst] / SAME_CAUSE_FACTOR]
        slow_links = {machine: sum(machine in pair for pair in same_cause) for machine in worst}
        machine = max(slow_links, key=lambda machine: (slow_links[machine], -machine))
        measured = np.count_nonzero(~np.isnan(np.delete(links.delay[machine], machine)))
        if slow_links[machine] >= 2 and slow_links[machine] > measured / 2:
            evidence = (
                f"{slow_links[machine]} of its links are at least {SLOW_FACTOR:g} times slower than the median one"
            )
            faults.append(LinkFault((machine,), evidence))
            slow = {pair: ratio for pair, ratio in slow.items() if machine not in pair}
        else:
            faults.append(LinkFault(worst, describe_link(links, *worst)))
            del slow[worst]
    return faults


def describe_link(links: Links, a: int, b: int) -> str:
    """What was measured between two machines, in the slower direction, beside the median."""
    delay = np.fmax(links.delay[a, b], links.delay[b, a])
    bandwidth = np.fmin(links.bandwidth[a, b], links.bandwidth[b, a])
    if not np.isfinite(delay):
        return "no connection"
    measured = links.measured
    return (
        f"{1e3 * delay:.2f} ms and {bandwidth / 1e6:.0f} MB/s, where the median link has "
        f"{1e3 * np.median(links.delay[measured]):.2f} ms and {np.median(links.bandwidth[measured]) / 1e6:.0f} MB/s"
    )
