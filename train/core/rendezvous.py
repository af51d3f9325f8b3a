"""Rendezvous: who takes part, until when, and in which epoch. JAX-free.

A member has a name and stays as long as it sends a heartbeat within its time-to-live. Whenever somebody joins, leaves
or expires the epoch goes up by one, so a number says which membership is meant. A member holds the *ticket* it was
given when it joined; one whose name was given to another since then (a process that was stopped, declared dead, and
woke up) is refused by its ticket.

    membership = joined(Membership(), "a", now=0.0, ttl=5.0)        a pure value, advanced by pure functions
    with Server() as server: ...                                    one small server holds it, JSON lines over TCP
    client = Client(server.address, "a"); client.join(); client.beat({"step": 3}); client.wait(beyond=1, timeout=5.0)

Supervisors use it to watch steps; replicas that meet rarely use it to find each other.
"""

import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ...configs.errors import MeshwrightError

TTL = 30.0  # seconds without a heartbeat
Operation = Callable[[Mapping[str, Any]], dict[str, Any]]


class Refused(MeshwrightError):
    """The rendezvous does not know this member any more: it expired, or another took its name."""


@dataclass(frozen=True)
class Member:
    """One who takes part."""

    ticket: int  # the epoch in which it joined: no two members of one name share it
    expires: float  # by the server's clock
    ttl: float
    info: Mapping[str, Any] = field(default_factory=dict)  # what it last told: an address, a step


@dataclass(frozen=True)
class Membership:
    """Who takes part, and the number of this membership."""

    epoch: int = 0
    members: Mapping[str, Member] = field(default_factory=dict)

    def public(self) -> dict[str, Any]:
        """What members are told: of each one its ticket, and what it told."""
        told = {name: {**one.info, "ticket": one.ticket} for name, one in sorted(self.members.items())}
        return {"epoch": self.epoch, "members": told}


def joined(
    membership: Membership, name: str, *, now: float, ttl: float = TTL, info: Mapping[str, Any] | None = None
) -> Membership:
    """`name` takes part in a new epoch; one of that name before it is replaced."""
    epoch = membership.epoch + 1
    return Membership(epoch, {**membership.members, name: Member(epoch, now + ttl, ttl, info or {})})


def beaten(membership: Membership, name: str, ticket: int, *, now: float, info: Mapping[str, Any]) -> Membership:
    """`name` is alive and tells `info`. Raises Refused where its ticket is not the member's."""
    member = known(membership, name, ticket)
    fresh = replace(member, expires=now + member.ttl, info={**member.info, **info})
    return replace(membership, members={**membership.members, name: fresh})


def left(membership: Membership, name: str, ticket: int) -> Membership:
    """`name` has gone; a new epoch. Raises Refused where its ticket is not the member's."""
    known(membership, name, ticket)
    others = {other: member for other, member in membership.members.items() if other != name}
    return Membership(membership.epoch + 1, others)


def expired(membership: Membership, *, now: float) -> Membership:
    """Those whose time is over have gone, all in one new epoch; the same value where there are none."""
    alive = {name: member for name, member in membership.members.items() if member.expires > now}
    return membership if len(alive) == len(membership.members) else Membership(membership.epoch + 1, alive)


def known(membership: Membership, name: str, ticket: int) -> Member:
    """The member `name`. Raises Refused where there is none with this ticket."""
    member = membership.members.get(name)
    if member is None or member.ticket != ticket:
        there = "gone" if member is None else f"another one, of epoch {member.ticket}"
        raise Refused(
            f"rendezvous: {name} of epoch {ticket} is not a member in epoch {membership.epoch}: it is {there}"
        )
    return member


class Room:
    """A membership that several threads change, and wait for. `clock` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._membership = Membership()

    @property
    def membership(self) -> Membership:
        """The members of this moment."""
        return self.change(lambda membership, now: membership)

    def change(self, step: Callable[[Membership, float], Membership]) -> Membership:
        """Advance the membership by `step(membership, now)`, after those whose time is over."""
        with self._changed:
            now = self._clock()
            before = self._membership
            self._membership = step(expired(before, now=now), now)
            if self._membership.epoch != before.epoch:
                self._changed.notify_all()
            return self._membership

    def wait(self, *, beyond: int, timeout: float) -> Membership:
        """The membership once its epoch is above `beyond`, or after `timeout` seconds as it is then."""
        deadline = self._clock() + timeout
        with self._changed:
            while (membership := self.membership).epoch <= beyond and (left_over := deadline - self._clock()) > 0:
                soonest = min((one.expires for one in membership.members.values()), default=deadline) - self._clock()
                self._changed.wait(max(min(left_over, soonest), 0.001))
            return membership


class Server:
    """A room behind a TCP port, one JSON object a line each way. `with Server() as server: server.address`.

    `operations` are further things a client may ask for, by name: functions from the request to the answer.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        clock: Callable[[], float] = time.monotonic,
        room: Room | None = None,
        operations: Mapping[str, Operation] | None = None,
    ) -> None:
        self.room = room = room or Room(clock)

        class Handler(socketserver.StreamRequestHandler):
            def setup(self) -> None:
                super().setup()
                probed(self.connection)

            def handle(self) -> None:
                for line in self.rfile:
                    self.wfile.write(json.dumps(answer(room, line, operations or {})).encode() + b"\n")

        class Listener(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            handle_error = staticmethod(lambda *_: None)  # a member that dies in mid-sentence

        self._listener = Listener((host, port), Handler)
        self.address = f"{host}:{self._listener.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()


def probed(connection: socket.socket) -> None:
    """Have the kernel end `connection` two minutes after the other machine went away without hanging up."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):  # seconds, seconds, probes
        if hasattr(socket, name):  # where it has not, the kernel's own times hold
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def answer(room: Room, line: bytes, operations: Mapping[str, Operation] = MappingProxyType({})) -> dict[str, Any]:
    """What a line of a client is answered: the membership, or {"error": ...}; never an exception."""
    try:
        asked = json.loads(line)
        do, name = asked["do"], asked.get("name", "")
        if do == "join":
            ttl, told = float(asked["ttl"]), dict(asked["info"])
            membership = room.change(lambda m, now: joined(m, name, now=now, ttl=ttl, info=told))
            return {**membership.public(), "ticket": membership.members[name].ticket}
        if do == "beat":
            ticket, told = int(asked["ticket"]), dict(asked["info"])
            return room.change(lambda m, now: beaten(m, name, ticket, now=now, info=told)).public()
        if do == "leave":
            return room.change(lambda m, _: left(m, name, int(asked["ticket"]))).public()
        if do == "wait":
            return room.wait(beyond=int(asked["beyond"]), timeout=float(asked["timeout"])).public()
        if do in operations:
            return operations[do](asked)
        raise ValueError(f"do: {do!r} is none of {', '.join(['join', 'beat', 'leave', 'wait', *operations])}")
    except Refused as error:
        return {"refused": str(error)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


class Client:
    """A member's end, closed by `with`; for one thread.

    Each call raises Refused where the member is not one any more, OSError where nobody answers.
    """

    def __init__(self, address: str, name: str, *, ttl: float = TTL, timeout: float = 10.0) -> None:
        host, _, port = address.rpartition(":")
        self._place, self._name, self._ttl, self._timeout = (host, int(port)), name, ttl, timeout
        self._socket: socket.socket | None = None
        self.ticket = -1

    def join(self, info: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Take part; the membership."""
        told = self._ask({"do": "join", "ttl": self._ttl, "info": dict(info or {})})
        self.ticket = told["ticket"]
        return told

    def beat(self, info: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Say that this member is alive, and `info`; the membership."""
        return self._ask({"do": "beat", "ticket": self.ticket, "info": dict(info or {})})

    def leave(self) -> dict[str, Any]:
        """Take part no longer; the membership without this member."""
        return self._ask({"do": "leave", "ticket": self.ticket})

    def wait(self, *, beyond: int, timeout: float) -> dict[str, Any]:
        """The membership once its epoch is above `beyond`, or as it is after `timeout` seconds."""
        return self._ask({"do": "wait", "beyond": beyond, "timeout": timeout}, patience=timeout)

    def ask(self, do: str, *, within: float = 0.0, **fields: Any) -> dict[str, Any]:
        """The answer to one of the server's further operations, which may take `within` seconds."""
        return self._ask({"do": do, "ticket": self.ticket, **fields}, patience=within)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any], *, patience: float = 0.0) -> dict[str, Any]:
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._place, self._timeout)
            self._socket.settimeout(self._timeout + patience)
            self._socket.sendall(json.dumps({**request, "name": self._name}).encode() + b"\n")
            told = json.loads(self._line())
        except (OSError, ValueError) as error:
            self.close()
            raise OSError(f"rendezvous {self._place[0]}:{self._place[1]}: {error}") from error
        if "refused" in told:
            raise Refused(told["refused"])
        if "error" in told:
            raise MeshwrightError(f"rendezvous: {told['error']} in answer to {request}")
        return told

    def _line(self) -> bytes:
        text = b""
        while not text.endswith(b"\n"):
            part = self._socket.recv(65536)
            if not part:
                raise OSError("closed the connection")
            text += part
        return text

    def close(self) -> None:
        """Hang up; the next call dials again."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
