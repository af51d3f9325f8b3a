"""Links between machines, measured pair by pair with plain sockets: delay, bandwidth, and how far clocks are apart.

Every machine meets every other once each way, in the rounds of a tournament, so that no two measurements share a
machine. Results meet in a rendezvous.

    take_part(session="1", rendezvous="node0:4000", number=2, processes=4)    on every machine, at about the same time
    links = collected(room, session="1", processes=4)                        on the supervisor's
    culprits(links)     ->   [Culprit((2,), ...)] a machine all of whose links are slow, or a pair (0, 3)

Source: the delay matrix of C4 (arXiv:2406.04594); what is slow in a whole row and column is the machine, not a link.
"""

import ipaddress
import math
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...parallel.outer.matchings import matchings
from ..core.rendezvous import Client, Room
from .agent_server import accepted

SMALL, PINGS = 64, 20  # bytes and number of the messages that measure delay; the quickest counts
LARGE, BURSTS = 4 << 20, 3  # of those that measure bandwidth
ENOUGH = 0.5  # seconds after which a slow link has been measured well enough
PATIENCE = 20.0  # seconds to wait for a partner
ROUNDS = 63  # among many machines each meets this many others
SLOW = 5.0  # times the median delay, or that part of the median bandwidth
ALIKE = 4.0  # links within this factor of the slowest are slow for one reason
NOTICED = 1e-3  # seconds of delay beyond the median that matter
HEAD = struct.Struct("!Q")  # bytes that follow
TIME = struct.Struct("!d")  # the answer: the other's clock, seconds since 1970

Dial = Callable[[tuple[str, int], float], socket.socket]


@dataclass(frozen=True)
class Links:
    """Matrices [from, to], float64; NaN where nothing was measured, infinite delay where no connection came about."""

    delay: np.ndarray  # seconds for a small message and its answer
    bandwidth: np.ndarray  # bytes a second
    offset: np.ndarray  # seconds by which the other's clock is ahead


@dataclass(frozen=True)
class Culprit:
    """A machine, or two and what is between them."""

    processes: tuple[int, ...]
    evidence: str


class Echo:
    """Answers whatever it is sent with the time. `with Echo() as echo: echo.port`."""

    def __enter__(self) -> "Echo":
        self._listener = socket.create_server(("", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="echo", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        for dialled in accepted(self._listener):
            threading.Thread(target=answer, args=(dialled,), daemon=True).start()


def answer(dialled: socket.socket) -> None:
    """Take in messages of the lengths they announce; answer each."""
    dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    scratch = memoryview(bytearray(1 << 20))
    with dialled:
        try:
            while head := dialled.recv(HEAD.size, socket.MSG_WAITALL):
                (left,) = HEAD.unpack(head)
                while left > 0:
                    if not (got := dialled.recv_into(scratch[: min(left, len(scratch))])):
                        return
                    left -= got
                dialled.sendall(TIME.pack(time.time()))
        except (OSError, struct.error):
            return  # the other went away


def measured(place: tuple[str, int], *, dial: Dial = socket.create_connection) -> tuple[float, float, float]:
    """(delay, bandwidth, offset) to an `Echo`; infinite delay where it cannot be reached."""
    try:
        with dial(place, 3.0) as line:
            line.settimeout(PATIENCE)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            delay, offset = min(exchanged(line, SMALL) for _ in range(PINGS))
            burst, begun = math.inf, time.monotonic()
            for _ in range(BURSTS):
                burst = min(burst, exchanged(line, LARGE)[0])
                if time.monotonic() - begun > ENOUGH:
                    break
            return delay, LARGE / max(burst - delay, 1e-9), offset
    except (OSError, struct.error):
        return math.inf, 0.0, math.nan


def exchanged(line: socket.socket, size: int) -> tuple[float, float]:
    """(seconds until a message of `size` bytes was answered, seconds by which the other's clock is ahead)."""
    sent, began = time.time(), time.monotonic()
    line.sendall(HEAD.pack(size) + bytes(size))
    (there,) = TIME.unpack(line.recv(TIME.size, socket.MSG_WAITALL))
    took = time.monotonic() - began
    return took, there - (sent + took / 2)


def take_part(
    *, session: str, rendezvous: str, number: int, processes: int, dial: Dial = socket.create_connection
) -> None:
    """Measure this machine's links to the others and tell the rendezvous; ends early where others do not come."""
    with Echo() as echo, Client(rendezvous, name(session, number), ttl=600.0) as client:
        found: dict[str, tuple[float, float, float]] = {}
        client.join({"address": [own_address(rendezvous), echo.port], "met": -1, "found": found})
        for meeting, partners in enumerate(matchings(processes)[:ROUNDS]):
            partner = int(partners[number])
            if partner != number:
                there = awaited(client, name(session, partner), meeting)
                if there is None:
                    break
                found[str(partner)] = measured((there[0], int(there[1])), dial=dial)
            client.beat({"met": meeting, "found": {to: finite(values) for to, values in found.items()}})
        client.beat({"done": True})
        time.sleep(2.0)  # a slower partner may still be measuring


def name(session: str, number: int) -> str:
    """Of a machine that takes part, in the rendezvous."""
    return f"links/{session}/{number}"


def finite(values: tuple[float, float, float]) -> list[float | None]:
    """JSON knows no infinity and no NaN."""
    return [value if math.isfinite(value) else None for value in values]


def own_address(rendezvous: str) -> str:
    """This machine's address on the way to the rendezvous."""
    host, _, port = rendezvous.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        return own_name(line, dialled=rendezvous)


def own_name(line: socket.socket, *, dialled: str) -> str:
    """The name by which the others reach this machine, told from a connection to `dialled` (HOST:PORT).

    A connection by loopback is to this machine itself, and HOST is what the others call it.
    """
    address = line.getsockname()[0]
    return dialled.rpartition(":")[0] if ipaddress.ip_address(address).is_loopback else address


def awaited(client: Client, partner: str, meeting: int) -> list | None:
    """The address of a partner who has come to a meeting; None where it does not come."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        info = client.beat()["members"].get(partner)
        if info is not None and info["met"] >= meeting - 1:
            return info["address"]
        time.sleep(0.01)
    return None


def collected(room: Room, *, session: str, processes: int, timeout: float = 2 * PATIENCE) -> Links:
    """What all who took part found, once they are done or `timeout` seconds are over."""
    deadline = time.monotonic() + timeout
    while True:
        there = {to: room.membership.members.get(name(session, to)) for to in range(processes)}
        infos = {to: one.info for to, one in there.items() if one is not None}
        if sum("done" in info for info in infos.values()) == processes or time.monotonic() > deadline:
            return assembled(infos, processes=processes)
        time.sleep(0.02)


def assembled(infos: dict, *, processes: int) -> Links:
    """Rows of what each found."""
    matrices = np.full((3, processes, processes), np.nan)
    for row, info in infos.items():
        for column, values in info.get("found", {}).items():
            delay, bandwidth, offset = values
            matrices[:, row, int(column)] = (
                math.inf if delay is None else delay,
                math.nan if bandwidth is None else bandwidth,
                math.nan if offset is None else offset,
            )
    return Links(*matrices)


def slowness(links: Links) -> np.ndarray:
    """How many times slower than the median link each is, the slower direction; [N, N], NaN where not measured."""
    known = np.isfinite(links.delay) & (links.bandwidth > 0)
    if not known.any():
        return np.full(links.delay.shape, np.nan)
    usual, width = np.median(links.delay[known]), np.median(links.bandwidth[known])
    late = np.where(links.delay > usual + NOTICED, links.delay / usual, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.fmax(late, width / links.bandwidth)
    ratio[np.isnan(links.delay)] = np.nan
    return np.fmax(ratio, ratio.T)


def culprits(links: Links) -> list[Culprit]:
    """Who is to blame for the slowest links, worst first: a machine most of whose links are as slow, else the pair.

    Two machines accuse nobody: there is no third to compare with.
    """
    ratio = slowness(links)
    count = len(ratio)
    slow = {(a, b): ratio[a, b] for a in range(count) for b in range(a + 1, count) if ratio[a, b] > SLOW}
    found = []
    while slow:
        worst = max(slow, key=lambda pair: slow[pair])
        alike = [pair for pair in slow if slow[pair] >= slow[worst] / ALIKE]
        shares = {one: sum(one in pair for pair in alike) for one in worst}
        machine = max(shares, key=lambda one: (shares[one], -one))
        met = np.count_nonzero(~np.isnan(np.delete(links.delay[machine], machine)))
        if shares[machine] >= 2 and shares[machine] > met / 2:
            told = f"{shares[machine]} of its links are at least {SLOW:g} times slower than the median one"
            found.append(Culprit((machine,), told))
            slow = {pair: ratio for pair, ratio in slow.items() if machine not in pair}
        else:
            found.append(Culprit(worst, described(links, *worst)))
            del slow[worst]
    return found


def described(links: Links, a: int, b: int) -> str:
    """What was measured between two, in the slower direction, beside the median."""
    known = np.isfinite(links.delay) & (links.bandwidth > 0)
    delay, bandwidth = (
        np.fmax(links.delay[a, b], links.delay[b, a]),
        np.fmin(links.bandwidth[a, b], links.bandwidth[b, a]),
    )
    if not np.isfinite(delay):
        return "no connection"
    return (
        f"{1e3 * delay:.2f} ms and {bandwidth / 1e6:.0f} MB/s, where the median link has "
        f"{1e3 * np.median(links.delay[known]):.2f} ms and {np.median(links.bandwidth[known]) / 1e6:.0f} MB/s"
    )
