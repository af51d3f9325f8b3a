"""Bytes between keepers: frames over TCP, length first, checksummed, timed out. JAX-free.

request     a frame of JSON
answer      a frame of JSON, {"error": ...} where it cannot be given, and a frame of bytes

with Listener(answer) as listener: listener.address
with Peer(address) as peer: told, content = peer.ask({"do": "read", "step": 7}, timeout=10.0)
"""

import json
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xxhash

from ...configs.errors import MeshwrightError

FRAME = struct.Struct("<4sQQ")  # magic, bytes, xxh3 of them
MAGIC = b"MESH"
LONGEST = 2**30  # bytes of a frame; more is not ours
TIMEOUT = 10.0  # seconds for an answer that needs no work

Answer = Callable[[dict[str, Any]], tuple[dict[str, Any], Any]]


class RequestRefused(MeshwrightError):
    """The other side answered that it cannot give what was asked for, and why."""


def send(to: socket.socket, content: Any) -> None:
    """One frame."""
    view = memoryview(content)
    to.sendall(FRAME.pack(MAGIC, len(view), xxhash.xxh3_64_intdigest(view)))
    to.sendall(view)


def receive(source: socket.socket, *, into: np.ndarray | None = None) -> np.ndarray:
    """One frame, in the bytes `into` if they are as many. Raises ConnectionError where it is not what was sent."""
    magic, length, seen = FRAME.unpack(_fill(np.empty(FRAME.size, np.uint8), source))
    if magic != MAGIC or length > LONGEST:
        raise ConnectionError("what arrived is no frame of ours")
    content = into if into is not None and len(into) == length else np.empty(length, np.uint8)
    _fill(content, source)
    if xxhash.xxh3_64_intdigest(content) != seen:
        raise ConnectionError("a frame was damaged on its way")
    return content


def _fill(content: np.ndarray, source: socket.socket) -> np.ndarray:
    view = memoryview(content)
    while view:
        count = source.recv_into(view)
        if not count:
            raise ConnectionError("closed in the middle of a frame")
        view = view[count:]
    return content


class RequestServer:
    """Answers requests on a port of its own, each connection in a thread.

    `host` is the name by which others reach it; it listens at `bind`, by default there.
    """

    def __init__(self, answer: Answer, host: str = "127.0.0.1", *, bind: str | None = None) -> None:
        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # an answer is two short writes
                while True:
                    told, content = answered(answer, receive(self.request))
                    send(self.request, json.dumps(told).encode())
                    send(self.request, content)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            handle_error = staticmethod(lambda *_: None)  # a peer that hung up, or died

        self._server = Server((host if bind is None else bind, 0), Handler)
        self.address = f"{host}:{self._server.server_address[1]}"

    def __enter__(self) -> "RequestServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def answered(answer: Answer, request: np.ndarray) -> tuple[dict[str, Any], Any]:
    """What `answer` says; its refusal where it raises one."""
    try:
        return answer(json.loads(bytes(request)))
    except (MeshwrightError, OSError, ValueError, KeyError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}, b""


class RequestClient:
    """The other side's address, and a connection to it that is opened when first needed; for several threads."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.address, self._place = address, (host, int(port))
        self._socket: socket.socket | None = None
        self._turn = threading.Lock()

    def request(
        self, request: Mapping[str, Any], *, timeout: float = TIMEOUT, into: np.ndarray | None = None
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The answer, its bytes in `into` if given.

        Raises NotGiven where it is a refusal, OSError where none that fills `into` came within `timeout` seconds.
        """
        with self._turn:
            try:
                if self._socket is None:
                    self._socket = socket.create_connection(self._place, timeout)
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket.settimeout(timeout)
                send(self._socket, json.dumps(request).encode())
                told = json.loads(bytes(receive(self._socket)))
                content = receive(self._socket, into=into)
            except (OSError, ValueError) as error:
                self._hang_up()
                raise OSError(f"keeper at {self.address}: {error}") from error
        if "error" in told:
            raise RequestRefused(f"keeper at {self.address}: {told['error']}")
        if into is not None and content is not into:
            raise OSError(f"keeper at {self.address}: gave {len(content)} bytes where {len(into)} were asked for")
        return told, content

    def __enter__(self) -> "RequestClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Hang up."""
        with self._turn:
            self._hang_up()


class ClientPool:
    """Connections to others by number, each at the address it tells now."""

    def __init__(self) -> None:
        self._peers: dict[int, RequestClient] = {}

    def client_for(self, number: int, address: str) -> RequestClient:
        """The peer of that number, which may have moved."""
        known = self._peers.get(number)
        if known is None or known.address != address:
            if known is not None:
                known.close()
            known = self._peers[number] = RequestClient(address)
        return known

    def close(self) -> None:
        """Hang up."""
        for peer in self._peers.values():
            peer.close()
