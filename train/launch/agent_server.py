"""The supervisor's connections to its agents: which slots have one, what it is told, how its trainers end. JAX-free.

    with AgentServer(processes=4) as server:
        server.connected_slots                   # slots whose agent answers
        server.send(3, {"do": "kill"})
        server.exit_code(3, epoch=1)             # of the trainer; None while it runs

A slot is the place of one process of the run; one agent (`agent.py`, which lists the messages) serves one slot.
"""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

HEARTBEAT_SECONDS = 1.0  # between two heartbeats of an agent
AGENT_TIMEOUT = 15.0  # seconds without a heartbeat after which an agent is lost, and its machine with it

logger = logging.getLogger(__name__)


@dataclass
class AgentConnection:
    """The connection to one agent."""

    host: str
    socket: socket.socket
    last_seen: float
    open: bool = True
    exit_codes: dict[int, int] = field(default_factory=dict)  # of trainers, by epoch
    trainer_killed: bool = True  # nothing that the agent started for the supervisor is left
    epoch: int = 0  # of the trainer that the agent was last told to start
    has_snapshot_agent: bool = False  # it was told to start one
    snapshot_agent_code: int | None = None  # exit code of that snapshot agent
    lock: threading.Lock = field(default_factory=threading.Lock)  # several threads send

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; close the connection where that fails."""
        try:
            with self.lock:
                self.socket.sendall(encode_message(message))
        except OSError:
            self.close()

    def close(self) -> None:
        """Hang up: an agent that still lives kills its trainer."""
        self.open = False
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class AgentServer:
    """Listens at `port` for agents. All methods may be called from one thread while readers run in theirs."""

    def __init__(self, processes: int, *, port: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._processes, self._clock = processes, clock
        self._connections: dict[int, AgentConnection] = {}  # by slot
        self._changed = threading.Condition()
        self._listener = socket.create_server(("", port), backlog=1024)
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> "AgentServer":
        threading.Thread(target=self._accept, name="agent-server", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for slot in list(self._connections):
            self.disconnect(slot)

    @property
    def connected_slots(self) -> set[int]:
        """Slots whose agent answers. A slot whose agent hung up, or has been silent for AGENT_TIMEOUT, is lost."""
        with self._changed:
            return {slot for slot, connection in self._connections.items() if self._has_recent_heartbeat(connection)}

    def host(self, slot: int) -> str:
        """The machine of the slot's agent, which may be lost; "?" where there never was one."""
        return self._connections[slot].host if slot in self._connections else "?"

    def send(self, slot: int, message: Mapping[str, Any]) -> None:
        """Send a message to the slot's agent; do nothing where that is gone."""
        connection = self._connections.get(slot)
        if connection is None or not connection.open:
            return
        if message["do"] == "start":
            connection.trainer_killed, connection.epoch = False, int(message["epoch"])
        if message["do"] == "start-snapshot-agent":
            connection.has_snapshot_agent, connection.snapshot_agent_code = True, None
        connection.send(message)

    def exit_code(self, slot: int, *, epoch: int) -> int | None:
        """Exit code of the trainer of an epoch; None while it runs."""
        return self._connections[slot].exit_codes.get(epoch) if slot in self._connections else None

    def started_trainer(self, slot: int, *, epoch: int) -> bool:
        """Whether the agent that is connected now started the trainer of `epoch`; false for a later agent."""
        return slot in self.connected_slots and self._connections[slot].epoch == epoch

    def snapshot_agent_failure(self, slot: int) -> str | None:
        """How the snapshot agent of a slot's agent ended, as a text; None while it runs."""
        connection = self._connections[slot]
        if slot not in self.connected_slots or not connection.has_snapshot_agent:
            return f"lost with its agent on {connection.host}"
        code = connection.snapshot_agent_code
        return None if code is None else f"exit code {code}"

    def wait_connected(self, slots: Collection[int], timeout: float) -> set[int]:
        """Wait for agents in `slots`; those that have none after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._missing(slots), timeout)
            return self._missing(slots)

    def wait_killed(self, slots: Collection[int], timeout: float) -> set[int]:
        """Wait until the agents in `slots` have killed their trainers; those that have not after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._not_killed(slots), timeout)
            return self._not_killed(slots)

    def disconnect(self, slot: int) -> None:
        """Hang up: an agent that still lives kills its trainer."""
        if slot in self._connections:
            self._connections[slot].close()

    def _has_recent_heartbeat(self, connection: AgentConnection) -> bool:
        """Whether the agent at the other end answers; else it is lost, and its machine with it."""
        return connection.open and self._clock() - connection.last_seen < AGENT_TIMEOUT

    def _missing(self, slots: Collection[int]) -> set[int]:
        """Slots of `slots` that have no agent: none has connected yet, or the last one is lost."""
        return set(slots) - self.connected_slots

    def _not_killed(self, slots: Collection[int]) -> set[int]:
        return {s for s in set(slots) - self._missing(slots) if not self._connections[s].trainer_killed}

    def _accept(self) -> None:
        for peer in accept_connections(self._listener):
            threading.Thread(target=self._read, args=(peer,), daemon=True).start()

    def _read(self, peer: socket.socket) -> None:
        enable_keepalive(peer)
        connection = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), peer, peer.makefile("rb") as lines:
            connection = self._register(json.loads(next(lines, b"{}")), peer)
            for line in lines if connection is not None else ():
                message = json.loads(line)
                self._record(connection, message)
                if "beat" in message:
                    connection.send({"beat": True})
        with self._changed:
            if connection is not None:
                connection.open = False
            self._changed.notify_all()

    def _register(self, hello: Mapping[str, Any], peer: socket.socket) -> AgentConnection | None:
        """Give a new agent the slot that it asks for, else the first free one; None where no such slot is free."""
        with self._changed:
            free = sorted(self._missing(range(self._processes)))
            slot = next(iter(free), None) if hello["hello"] is None else int(hello["hello"])
            if slot not in free:
                return None
            previous = self._connections.get(slot)
            if previous is not None:
                previous.close()  # it was lost; should it come back, the slot is not its own any more
            connection = AgentConnection(str(hello["host"]), peer, self._clock())
            connection.exit_codes = previous.exit_codes if previous is not None else {}
            self._connections[slot] = connection
            self._changed.notify_all()
        logger.debug("process %d: agent on %s", slot, connection.host)
        return connection

    def _record(self, connection: AgentConnection, message: Mapping[str, Any]) -> None:
        with self._changed:
            connection.last_seen = self._clock()
            if "exit" in message:
                connection.exit_codes[int(message["epoch"])] = int(message["exit"])
            if "snapshot_agent_exit" in message:
                connection.snapshot_agent_code = int(message["snapshot_agent_exit"])
            connection.trainer_killed = connection.trainer_killed or "killed" in message
            self._changed.notify_all()


def encode_message(message: Mapping[str, Any]) -> bytes:
    """A message as one line of JSON."""
    return json.dumps(message).encode() + b"\n"


def accept_connections(listener: socket.socket) -> Iterator[socket.socket]:
    """Yield connections as they come, until `listener` is closed."""
    while True:
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        yield peer


def connect(address: str) -> socket.socket:
    """A connection to HOST:PORT that notices a peer which is gone without closing it. Raises OSError."""
    host, _, port = address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    connection.settimeout(None)
    return enable_keepalive(connection)


def enable_keepalive(connection: socket.socket) -> socket.socket:
    """Have the kernel probe a silent peer, and end the connection after half a minute without an answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection
