"""Requests and answers over TCP between the snapshot agents of a run: checksummed frames, with timeouts. No JAX.

    request     a frame of JSON
    answer      a frame of JSON, {"error": ...} for a refusal, and a frame of bytes
    frame       4 bytes magic | 8 bytes length | 8 bytes XXH3 of the payload | payload     (little-endian)

    with RequestServer(handler) as server: server.address
    with RequestClient(address) as client: answer, payload = client.request({"do": "read-parity", "step": 7})

A connection is blocking and serves one request after another. Transfers between islands, which are resumed after a cut,
are in `payload_server.py`.
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

HEADER = struct.Struct("<4sQQ")  # magic, length, checksum
MAGIC = b"MESH"
MAX_FRAME_BYTES = 2**30
ANSWER_TIMEOUT = 10.0  # seconds, for an answer that needs no work

Handler = Callable[[dict[str, Any]], tuple[dict[str, Any], Any]]  # request -> answer, payload


class RequestRefused(MeshwrightError):
    """The server answered that it refuses the request, and why."""


def send_frame(connection: socket.socket, payload: Any) -> None:
    """Send `payload`, anything with a buffer, as one frame."""
    view = memoryview(payload)
    connection.sendall(HEADER.pack(MAGIC, len(view), xxhash.xxh3_64_intdigest(view)))
    connection.sendall(view)


def receive_frame(connection: socket.socket, *, into: np.ndarray | None = None) -> np.ndarray:
    """The payload of the next frame, uint8; in `into` if that has its size. Raises ConnectionError if it is damaged."""
    magic, length, checksum = HEADER.unpack(_fill(np.empty(HEADER.size, np.uint8), connection))
    if magic != MAGIC or length > MAX_FRAME_BYTES:
        raise ConnectionError(f"no frame of Meshwright: it begins with {magic!r} and announces {length} bytes")
    payload = into if into is not None and len(into) == length else np.empty(length, np.uint8)
    _fill(payload, connection)
    if (found := xxhash.xxh3_64_intdigest(payload)) != checksum:
        raise ConnectionError(f"a frame of {length} bytes has the checksum {found:016x}, not {checksum:016x}")
    return payload


def _fill(buffer: np.ndarray, connection: socket.socket) -> np.ndarray:
    view = memoryview(buffer)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError(f"the connection was closed with {len(view)} bytes of a frame missing")
        view = view[count:]
    return buffer


class RequestServer:
    """Answers requests on a port of its own, each connection in a thread.

    `host` is the name by which others reach it; it listens at `bind`, by default the same.
    """

    def __init__(self, handler: Handler, host: str = "127.0.0.1", *, bind: str | None = None) -> None:
        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # an answer is two short writes
                while True:
                    answer, payload = _answer(handler, receive_frame(self.request))
                    send_frame(self.request, json.dumps(answer).encode())
                    send_frame(self.request, payload)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            handle_error = staticmethod(lambda *_: None)  # a client that closed the connection, or died

        self._server = Server((host if bind is None else bind, 0), Connection)
        self.address = f"{host}:{self._server.server_address[1]}"

    def __enter__(self) -> "RequestServer":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _answer(handler: Handler, request: np.ndarray) -> tuple[dict[str, Any], Any]:
    """The handler's answer, or a refusal if it raises."""
    try:
        return handler(json.loads(bytes(request)))
    except (MeshwrightError, OSError, ValueError, KeyError, TypeError) as error:
        return {"error": f"{type(error).__name__}: {error}"}, b""


class RequestClient:
    """Sends requests to the server at `address`; connects when the first one is sent. Safe for several threads."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.address, self._endpoint = address, (host, int(port))
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def request(
        self, request: Mapping[str, Any], *, timeout: float = ANSWER_TIMEOUT, into: np.ndarray | None = None
    ) -> tuple[dict[str, Any], np.ndarray]:
        """The answer and its payload, in `into` if given.

        Raises RequestRefused for a refusal, OSError if no answer that fills `into` came within `timeout` seconds.
        """
        with self._lock:
            try:
                if self._socket is None:
                    self._socket = socket.create_connection(self._endpoint, timeout)
                    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._socket.settimeout(timeout)
                send_frame(self._socket, json.dumps(request).encode())
                answer = json.loads(bytes(receive_frame(self._socket)))
                payload = receive_frame(self._socket, into=into)
            except (OSError, ValueError) as error:
                self._disconnect()
                raise OSError(f"snapshot agent at {self.address}: {error}") from error
        if "error" in answer:
            raise RequestRefused(f"snapshot agent at {self.address}: {answer['error']}")
        if into is not None and payload is not into:
            raise OSError(f"snapshot agent at {self.address}: sent {len(payload)} bytes, not {len(into)}")
        return answer, payload

    def __enter__(self) -> "RequestClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Close the connection; the next request opens another one."""
        with self._lock:
            self._disconnect()


class ClientPool:
    """Clients by number, each at its server's current address."""

    def __init__(self) -> None:
        self._clients: dict[int, RequestClient] = {}

    def client_for(self, number: int, address: str) -> RequestClient:
        """The client of that number, at `address`, which may have changed since the last call."""
        client = self._clients.get(number)
        if client is None or client.address != address:
            if client is not None:
                client.close()
            client = self._clients[number] = RequestClient(address)
        return client

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()
