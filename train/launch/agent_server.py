"""The supervisor's end of the agents: who is there, what to tell them, how their trainers ended. JAX-free.

with Switchboard() as board: board.present; board.tell(3, {"do": "kill"}); board.code(3, epoch=1)
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

BEAT = 1.0  # seconds between two signs of life of an agent
LOST = 15.0  # seconds without one after which it is gone with its machine

logger = logging.getLogger(__name__)


@dataclass
class Line:
    """The connection to one agent."""

    host: str
    socket: socket.socket
    heard: float
    open: bool = True
    codes: dict[int, int] = field(default_factory=dict)  # exit code of the trainer, by epoch
    killed: bool = True  # nothing it was told to start is left
    epoch: int = 0  # of the trainer it was told to start
    kept: bool = False  # it was told to start a keeper
    keeper: int | None = None  # how that one ended
    turn: threading.Lock = field(default_factory=threading.Lock)  # several threads tell it things

    def send(self, words: Mapping[str, Any]) -> None:
        """One line; hangs up where it cannot be sent."""
        try:
            with self.turn:
                self.socket.sendall(json.dumps(words).encode() + b"\n")
        except OSError:
            self.drop()

    def drop(self) -> None:
        """Hang up: an agent that still lives kills its trainer."""
        self.open = False
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


class Switchboard:
    """Agents dial `port`. All methods may be called from one thread while readers run in theirs."""

    def __init__(self, processes: int, *, port: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._processes, self._clock = processes, clock
        self._lines: dict[int, Line] = {}
        self._changed = threading.Condition()
        self._listener = socket.create_server(("", port), backlog=1024)
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> "Switchboard":
        threading.Thread(target=self._accept, name="switchboard", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for number in list(self._lines):
            self.drop(number)

    @property
    def present(self) -> set[int]:
        """Processes whose agent answers."""
        with self._changed:
            return {number for number, line in self._lines.items() if self._alive(line)}

    def host(self, number: int) -> str:
        """The machine of an agent that is or was there; "?" where none ever was."""
        line = self._lines.get(number)
        return line.host if line is not None else "?"

    def tell(self, number: int, words: Mapping[str, Any]) -> None:
        """Send; one that is gone hears nothing."""
        line = self._lines.get(number)
        if line is None or not line.open:
            return
        if words["do"] == "start":
            line.killed, line.epoch = False, int(words["epoch"])
        if words["do"] == "keep":
            line.kept, line.keeper = True, None
        line.send(words)

    def code(self, number: int, *, epoch: int) -> int | None:
        """Exit code of the trainer of an epoch; None while it runs."""
        line = self._lines.get(number)
        return None if line is None else line.codes.get(epoch)

    def serves(self, number: int, *, epoch: int) -> bool:
        """Whether the agent is there that started the trainer of an epoch, not one that came after it."""
        return number in self.present and self._lines[number].epoch == epoch

    def keeper(self, number: int) -> str | None:
        """How the keeper that an agent was told to start ended, in words; None while it runs."""
        line = self._lines[number]
        if number not in self.present or not line.kept:
            return f"lost with its agent on {line.host}"
        return None if line.keeper is None else f"exit code {line.keeper}"

    def wait(self, numbers: Collection[int], timeout: float) -> set[int]:
        """Those of `numbers` whose agent is not there after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self._absent(numbers), timeout)
            return self._absent(numbers)

    def wait_killed(self, numbers: Collection[int], timeout: float) -> set[int]:
        """Those of `numbers` that have not said within `timeout` seconds that nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unkilled(numbers), timeout)
            return self._unkilled(numbers)

    def drop(self, number: int) -> None:
        """Hang up: an agent that still lives kills its trainer."""
        if number in self._lines:
            self._lines[number].drop()

    def _alive(self, line: Line) -> bool:
        return line.open and self._clock() - line.heard < LOST

    def _absent(self, numbers: Collection[int]) -> set[int]:
        return {n for n in numbers if n not in self._lines or not self._alive(self._lines[n])}

    def _unkilled(self, numbers: Collection[int]) -> set[int]:
        return {n for n in set(numbers) - self._absent(numbers) if not self._lines[n].killed}

    def _accept(self) -> None:
        for dialled in accepted(self._listener):
            threading.Thread(target=self._read, args=(dialled,), daemon=True).start()

    def _read(self, dialled: socket.socket) -> None:
        patient(dialled)
        line = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), dialled, dialled.makefile("rb") as words:
            line = self._seat(json.loads(next(words, b"{}")), dialled)
            for text in words if line is not None else ():
                told = json.loads(text)
                self._hear(line, told)
                if "beat" in told:
                    line.send({"beat": True})
        with self._changed:
            if line is not None:
                line.open = False
            self._changed.notify_all()

    def _seat(self, hello: Mapping[str, Any], dialled: socket.socket) -> Line | None:
        """The line of who dials; None where it has no place: that of another that lives, or none is free."""
        with self._changed:
            free = [n for n in range(self._processes) if n in self._absent(range(self._processes))]
            wanted = hello["hello"]
            number = next(iter(free), None) if wanted is None else int(wanted)
            if number not in free:
                return None
            before = self._lines.get(number)
            codes = before.codes if before is not None else {}
            if before is not None:
                before.drop()  # it was lost; should it be back, it is not the one
            line = self._lines[number] = Line(str(hello["host"]), dialled, self._clock(), codes=codes)
            self._changed.notify_all()
        logger.debug("process %d: agent on %s", number, hello["host"])
        return line

    def _hear(self, line: Line, told: Mapping[str, Any]) -> None:
        with self._changed:
            line.heard = self._clock()
            if "exit" in told:
                line.codes[int(told["epoch"])] = int(told["exit"])
            if "keeper" in told:
                line.keeper = int(told["keeper"])
            line.killed = line.killed or "killed" in told
            self._changed.notify_all()


def accepted(listener: socket.socket) -> Iterator[socket.socket]:
    """Connections as they come, until `listener` is closed."""
    while True:
        try:
            dialled, _ = listener.accept()
        except OSError:
            return
        yield dialled


def connected(address: str) -> socket.socket:
    """A connection to HOST:PORT that notices a peer which is gone without a word."""
    host, _, port = address.rpartition(":")
    line = socket.create_connection((host, int(port)), timeout=10)
    line.settimeout(None)
    return patient(line)


def patient(line: socket.socket) -> socket.socket:
    """Ask a silent peer's machine for a sign of life, and give up half a minute later."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, option):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return line
