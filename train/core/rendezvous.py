"""Rendezvous: the members of a group, with time-to-live and epochs. JAX-free.

A member has a name and stays as long as it sends a heartbeat within its time-to-live. Whenever a member joins, leaves
or expires, the epoch goes up by one, so the epoch identifies a membership. A member holds the *ticket* that it got when
it joined: if its name was given to another member since then (the process was stopped, declared dead, and woke up), its
ticket is refused.

    membership = join_member(Membership(), "a", now=0.0, ttl=5.0)   a pure value, advanced by pure functions
    with Server() as server: ...                                    serves it over TCP, one JSON object a line
    client = Client(server.address, "a")
    client.join(); client.heartbeat({"step": 3}); client.wait(beyond=1, timeout=5.0)

Supervisors use it to watch steps; islands use it to find each other.
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

TTL = 30.0  # seconds without a heartbeat after which a member expires
Operation = Callable[[Mapping[str, Any]], dict[str, Any]]


class NotAMember(MeshwrightError):
    """The member expired, or another member took its name."""


@dataclass(frozen=True)
class Member:
    """One member of a group."""

    ticket: int  # the epoch in which it joined: no two members of one name share it
    expires: float  # time of the server's clock
    ttl: float  # seconds
    info: Mapping[str, Any] = field(default_factory=dict)  # what it last published: an address, a step


@dataclass(frozen=True)
class Membership:
    """The members, and the epoch of this membership."""

    epoch: int = 0
    members: Mapping[str, Member] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what members are sent: the epoch, and the info and ticket of every member."""
        members = {name: {**member.info, "ticket": member.ticket} for name, member in sorted(self.members.items())}
        return {"epoch": self.epoch, "members": members}


def join_member(
    membership: Membership, name: str, *, now: float, ttl: float = TTL, info: Mapping[str, Any] | None = None
) -> Membership:
    """Add the member `name`, in a new epoch; an earlier member of that name is replaced."""
    epoch = membership.epoch + 1
    return Membership(epoch, {**membership.members, name: Member(epoch, now + ttl, ttl, info or {})})


def record_heartbeat(
    membership: Membership, name: str, ticket: int, *, now: float, info: Mapping[str, Any]
) -> Membership:
    """Extend the life of `name` and update its info. Raises NotAMember if the ticket is not the member's."""
    member = require_member(membership, name, ticket)
    renewed = replace(member, expires=now + member.ttl, info={**member.info, **info})
    return replace(membership, members={**membership.members, name: renewed})


def remove_member(membership: Membership, name: str, ticket: int) -> Membership:
    """Remove the member `name`, in a new epoch. Raises NotAMember if the ticket is not the member's."""
    require_member(membership, name, ticket)
    remaining = {other: member for other, member in membership.members.items() if other != name}
    return Membership(membership.epoch + 1, remaining)


def expire_members(membership: Membership, *, now: float) -> Membership:
    """Remove all members whose time is over, in one new epoch; return the same value if there are none."""
    alive = {name: member for name, member in membership.members.items() if member.expires > now}
    return membership if len(alive) == len(membership.members) else Membership(membership.epoch + 1, alive)


def require_member(membership: Membership, name: str, ticket: int) -> Member:
    """Return the member `name`. Raises NotAMember if there is none with this ticket."""
    member = membership.members.get(name)
    if member is None or member.ticket != ticket:
        reason = "it left or expired" if member is None else f"its name belongs to a member of epoch {member.ticket}"
        raise NotAMember(f"rendezvous: {name} of epoch {ticket} is not a member in epoch {membership.epoch}: {reason}")
    return member


class MembershipStore:
    """A membership that several threads change and wait for. `clock` returns monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._membership = Membership()

    @property
    def membership(self) -> Membership:
        """The membership of this moment, without expired members."""
        return self.change(lambda membership, now: membership)

    def change(self, update: Callable[[Membership, float], Membership]) -> Membership:
        """Remove expired members, apply `update(membership, now)`, and return the new membership."""
        with self._changed:
            now, epoch = self._clock(), self._membership.epoch
            self._membership = update(expire_members(self._membership, now=now), now)
            if self._membership.epoch != epoch:
                self._changed.notify_all()
            return self._membership

    def wait(self, *, beyond: int, timeout: float) -> Membership:
        """Wait until the epoch is above `beyond`, `timeout` seconds at most; return the membership."""
        deadline = self._clock() + timeout
        with self._changed:
            while (membership := self.membership).epoch <= beyond and (remaining := deadline - self._clock()) > 0:
                next_expiry = min((member.expires for member in membership.members.values()), default=deadline)
                self._changed.wait(max(min(remaining, next_expiry - self._clock()), 0.001))
            return membership


class Server:
    """Serves a membership store on a TCP port, one JSON object a line each way.

    `with Server() as server: server.address`. `operations` are further requests that clients may make, by name:
    functions from the request to the answer.
    """

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, *, store: MembershipStore | None = None,
        operations: Mapping[str, Operation] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.store = store = store or MembershipStore()

        class Handler(socketserver.StreamRequestHandler):
            def setup(self) -> None:
                super().setup()
                enable_keepalive(self.connection)

            def handle(self) -> None:
                for line in self.rfile:
                    self.wfile.write(json.dumps(answer_request(store, line, operations)).encode() + b"\n")

        class Listener(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            handle_error = staticmethod(lambda *_: None)  # a member may die in the middle of a request

        self._listener = Listener((host, port), Handler)
        self.address = f"{host}:{self._listener.server_address[1]}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown()
        self._listener.server_close()


def enable_keepalive(connection: socket.socket) -> None:
    """Let the kernel close `connection` two minutes after the other machine vanished without closing it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):  # seconds, seconds, probes
        if hasattr(socket, name):  # elsewhere the kernel's defaults hold
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def answer_request(
    store: MembershipStore, line: bytes, operations: Mapping[str, Operation] = MappingProxyType({})
) -> dict[str, Any]:
    """Answer one line of a client: the membership, {"refused": ...} or {"error": ...}. Raises nothing."""
    try:
        request = json.loads(line)
        do, name = request["do"], request.get("name", "")
        if do == "join":
            ttl, info = float(request["ttl"]), dict(request["info"])
            membership = store.change(lambda m, now: join_member(m, name, now=now, ttl=ttl, info=info))
            return {**membership.to_json(), "ticket": membership.members[name].ticket}
        if do == "heartbeat":
            ticket, info = int(request["ticket"]), dict(request["info"])
            return store.change(lambda m, now: record_heartbeat(m, name, ticket, now=now, info=info)).to_json()
        if do == "leave":
            return store.change(lambda m, _: remove_member(m, name, int(request["ticket"]))).to_json()
        if do == "wait":
            return store.wait(beyond=int(request["beyond"]), timeout=float(request["timeout"])).to_json()
        if do in operations:
            return operations[do](request)
        raise ValueError(f"do: {do!r} is none of {', '.join(['join', 'heartbeat', 'leave', 'wait', *operations])}")
    except NotAMember as error:
        return {"refused": str(error)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}


class Client:
    """The connection of one member to a server, closed by `with`; for one thread.

    Its requests return the membership as JSON: {"epoch": ..., "members": {name: info}}. They raise NotAMember if the
    member has expired or was replaced, OSError if the server does not answer.
    """

    def __init__(self, address: str, name: str, *, ttl: float = TTL, timeout: float = 10.0) -> None:
        host, _, port = address.rpartition(":")
        self._address, self._name, self._ttl, self._timeout = (host, int(port)), name, ttl, timeout
        self._socket: socket.socket | None = None
        self.ticket = -1

    def join(self, info: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Become a member."""
        answer = self._request({"do": "join", "ttl": self._ttl, "info": dict(info or {})})
        self.ticket = answer["ticket"]
        return answer

    def heartbeat(self, info: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Extend the life of this member and update its info."""
        return self._request({"do": "heartbeat", "ticket": self.ticket, "info": dict(info or {})})

    def leave(self) -> dict[str, Any]:
        """Stop being a member."""
        return self._request({"do": "leave", "ticket": self.ticket})

    def wait(self, *, beyond: int, timeout: float) -> dict[str, Any]:
        """Wait until the epoch is above `beyond`, `timeout` seconds at most."""
        return self._request({"do": "wait", "beyond": beyond, "timeout": timeout}, patience=timeout)

    def ask(self, do: str, *, within: float = 0.0, **fields: Any) -> dict[str, Any]:
        """Return the answer of one of the server's `operations`, which may take `within` seconds."""
        return self._request({"do": do, "ticket": self.ticket, **fields}, patience=within)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, request: dict[str, Any], *, patience: float = 0.0) -> dict[str, Any]:
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, self._timeout)
                self._lines = self._socket.makefile("rb")
            self._socket.settimeout(self._timeout + patience)
            self._socket.sendall(json.dumps({**request, "name": self._name}).encode() + b"\n")
            line = self._lines.readline()
            if not line.endswith(b"\n"):
                raise OSError("the server closed the connection")
            answer = json.loads(line)
        except (OSError, ValueError) as error:
            self.close()
            raise OSError(f"rendezvous {self._address[0]}:{self._address[1]}: {error}") from error
        if "refused" in answer:
            raise NotAMember(answer["refused"])
        if "error" in answer:
            raise MeshwrightError(f"rendezvous: {answer['error']} in answer to {request}")
        return answer

    def close(self) -> None:
        """Close the connection; the next request opens it again."""
        if self._socket is not None:
            self._lines.close()  # the connection stays open as long as either is
            self._socket.close()
            self._socket = None
