"""Payloads between islands: each island publishes its own on a server, and the others fetch them. No JAX.

    server = PayloadServer(name, host="0.0.0.0", port=0, ...)   serves in a thread of its own
    server.publish(key, payload, ticket=...)                    whoever requests `key` gets these bytes
    server.collect(key, peers, deadline=...)                    the payload of that key of each peer, or a failure

Only requested bytes are sent, so nothing arrives unexpected or twice: a transfer that was cut is requested again from
the first byte that is missing, a payload that was damaged from its start. A payload belongs to one life of its sender
(`ticket`): an island that crashed and restarted has another ticket, and parts of two lives are never joined.

Both ends send the `fingerprint` of their run, and islands of another run are refused. Messages and payloads travel in
the frames of `framing.py`; a connection serves one request.
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import xxhash

from .framing import CHUNK_BYTES, CorruptFrame, encode_frame, encode_message, read_frame, read_message
from .throttle import Throttle

PROTOCOL = 2
KEPT_PAYLOADS = 2  # of each kind and reader; older ones are not requested any more
RETRY_SECONDS = 0.25  # before the first retry; doubled for each one that receives nothing


class Peer(NamedTuple):
    """An island in one of its lives."""

    name: str
    ticket: int
    address: str  # host:port of its payload server


class StoredPayload(NamedTuple):
    """A published payload."""

    ticket: int  # of the sender's life
    payload: bytes
    digest: str  # its XXH3, 128 bits
    reader: str | None  # name of the only island that requests it


class FetchFailure(NamedTuple):
    """Why a payload did not arrive."""

    reason: str


@dataclass
class TransferCounters:
    """What a payload server has done since its start."""

    sent_bytes: int = 0  # to other islands: payloads, their frames, and requests
    received_bytes: int = 0  # of payloads, counted after each frame
    resumed: int = 0  # transfers that continued after a cut
    corrupted: int = 0  # damaged frames and payloads
    by_kind: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # bytes sent, by `kind` of the key


class ServerSettings(NamedTuple):
    """Limits of a payload server."""

    timeout: float = 30.0  # seconds without a byte
    wait_seconds: float = 10.0  # for a payload that is not published yet, before the answer is that it is absent
    retries: int = 3
    throttle: Throttle | None = None


class PayloadServer:
    """Serves payloads and fetches others'. `fingerprint` is that of the run, `description` the settings it is made of.

    `on_missing` is called, in the server's thread, with a key that is requested and not published yet.
    """

    def __init__(
        self,
        name: str,
        *,
        fingerprint: str,
        description: Mapping[str, Any],
        settings: ServerSettings,
        host: str = "127.0.0.1",
        port: int = 0,
        on_missing: Callable[[str], None] = lambda key: None,
    ) -> None:
        self.name, self.counters = name, TransferCounters()
        self.fingerprint, self._description, self._settings = fingerprint, dict(description), settings
        self._throttle = settings.throttle or Throttle()
        self._on_missing = on_missing
        self.active_sends = 0  # payloads on their way to others
        self._payloads: dict[str, StoredPayload] = {}
        self._published = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="payload-server", daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, host, port))
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stop serving; transfers under way are cut."""

        async def stop() -> None:
            self._server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def publish(self, key: str, payload: bytes, *, ticket: int, reader: str | None = None) -> None:
        """Offer `payload` under `key` in this life (`ticket`); of many of one kind the oldest is dropped.

        A payload for one `reader` only is dropped as soon as that island has it.
        """
        self._run(self._store(key, StoredPayload(ticket, payload, xxhash.xxh3_128_hexdigest(payload), reader)))

    def collect(
        self,
        key: str,
        peers: Sequence[Peer],
        *,
        deadline: float,
        patience: float,
        alive: Callable[[Peer], bool] = lambda peer: True,
    ) -> dict[str, bytes | FetchFailure]:
        """The payload `key` of each of `peers`, all at once: bytes, or why not within `deadline` seconds.

        A peer that has not published that key yet is asked again for `patience` seconds, as long as `alive(peer)`,
        which is called in the server's thread.
        """

        async def fetch_all() -> dict[str, bytes | FetchFailure]:
            results = await asyncio.gather(*(self._fetch(key, peer, deadline, patience, alive) for peer in peers))
            return {peer.name: result for peer, result in zip(peers, results, strict=True)}

        return self._run(fetch_all())

    def compare_settings(self, peer: Peer) -> dict[str, tuple[Any, Any]] | None:
        """Settings that differ if `peer` is of another run: key -> (there, here); else {}. None: it does not answer."""
        return self._run(self._compare(peer))

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # ---- serving

    async def _store(self, key: str, entry: StoredPayload) -> None:
        self._payloads.pop(key, None)
        self._payloads[key] = entry
        similar = [
            name for name, other in self._payloads.items() if (kind(name), other.reader) == (kind(key), entry.reader)
        ]
        for oldest in similar[:-KEPT_PAYLOADS]:
            del self._payloads[oldest]
        self._published.set()
        self._published = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await self._within_timeout(read_message(reader))
            await self._answer(request, reader, writer)
        except (OSError, EOFError, TimeoutError, KeyError, TypeError):
            pass  # the client requests it again
        finally:
            writer.close()

    async def _answer(
        self, request: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if request["protocol"] != PROTOCOL or request["fingerprint"] != self.fingerprint:
            await self._send(writer, "handshake", refused=True, protocol=PROTOCOL, settings=self._description)
            return
        if "key" not in request:
            await self._send(writer, "handshake", refused=False)
            return
        key, offset, ticket = request["key"], int(request["offset"]), int(request["ticket"])
        entry = await self._wait_for_payload(key, ticket)
        if entry is None:
            await self._send(writer, kind(key), absent=True)
            return
        self.active_sends += 1
        try:
            await self._send_payload(kind(key), entry, offset, writer)
            if entry.reader == request["name"]:
                # Wait for the reader's confirmation: bytes may be on their way for long after they are written.
                await self._within_timeout(read_message(reader))
                if self._payloads.get(key) is entry:
                    del self._payloads[key]
        finally:
            self.active_sends -= 1

    async def _send_payload(
        self, traffic: str, entry: StoredPayload, offset: int, writer: asyncio.StreamWriter
    ) -> None:
        view = memoryview(entry.payload)
        await self._send(writer, traffic, size=len(view), digest=entry.digest, confirm=entry.reader is not None)
        for start in range(offset, len(view), CHUNK_BYTES):
            await self._write(writer, traffic, encode_frame(view[start : start + CHUNK_BYTES]))

    async def _wait_for_payload(self, key: str, ticket: int) -> StoredPayload | None:
        """The payload, which may be published in a moment. None: absent, or of another life."""
        deadline = time.monotonic() + self._settings.wait_seconds
        while True:
            entry = self._payloads.get(key)
            if entry is not None:
                return entry if entry.ticket == ticket else None
            self._on_missing(key)
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                    await self._published.wait()
            except TimeoutError:
                return None

    async def _send(self, writer: asyncio.StreamWriter, traffic: str, **fields: Any) -> None:
        await self._throttle.wait_latency()
        await self._write(writer, traffic, encode_message(**fields))

    async def _write(self, writer: asyncio.StreamWriter, traffic: str, data: bytes) -> None:
        await self._throttle.wait_to_send(len(data))
        writer.write(data)
        await self._within_timeout(writer.drain())
        self.counters.sent_bytes += len(data)
        self.counters.by_kind[traffic] += len(data)

    # ---- fetching

    async def _fetch(
        self, key: str, peer: Peer, deadline: float, patience: float, alive: Callable[[Peer], bool]
    ) -> bytes | FetchFailure:
        partial, attempts, start = PartialPayload(), 0, time.monotonic()
        try:
            async with asyncio.timeout(deadline):
                while True:
                    before = len(partial.data)
                    try:
                        if await self._fetch_once(key, peer, partial):
                            return bytes(partial.data)
                        if not alive(peer):
                            return FetchFailure(f"{peer.name} has left")
                        if time.monotonic() - start > patience:
                            return FetchFailure(f"{peer.name} did not publish `{key}` within {patience:g} s")
                        continue  # it has not published it yet
                    except OtherRunError as error:
                        return FetchFailure(str(error))
                    except (OSError, EOFError, TimeoutError, KeyError, ValueError) as error:
                        corrupt = isinstance(error, CorruptFrame)
                        self.counters.corrupted += corrupt
                        attempts = 0 if len(partial.data) > before and not corrupt else attempts + 1
                        if attempts > self._settings.retries:
                            reason = str(error) or type(error).__name__
                            return FetchFailure(f"{peer.name}: {reason} ({attempts} attempts)")
                    await asyncio.sleep(RETRY_SECONDS * 2**attempts)
                    self.counters.resumed += bool(partial.data)
        except TimeoutError:
            return FetchFailure(f"{peer.name}: {len(partial.data)} bytes after {deadline:g} s")

    async def _fetch_once(self, key: str, peer: Peer, partial: "PartialPayload") -> bool:
        """Continue a transfer; True when it is complete. False: the peer has not published that key yet."""
        reader, writer = await self._connect(peer)
        try:
            await self._request(writer, kind(key), key=key, ticket=peer.ticket, offset=len(partial.data))
            answer = await self._within_timeout(read_message(reader))
            if answer.get("refused"):
                raise OtherRunError(f"{peer.name} is of another run")
            if answer.get("absent"):
                return False
            partial.expect(int(answer["size"]), str(answer["digest"]))
            while len(partial.data) < partial.size:
                frame = await self._within_timeout(read_frame(reader))
                partial.data += frame
                self.counters.received_bytes += len(frame)
            partial.check()
            if answer["confirm"]:
                await self._write(writer, kind(key), encode_message(whole=True))
            return True
        finally:
            writer.close()

    async def _within_timeout(self, coroutine: Any) -> Any:
        async with asyncio.timeout(self._settings.timeout):
            return await coroutine

    async def _connect(self, peer: Peer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = peer.address.rpartition(":")
        return await self._within_timeout(asyncio.open_connection(host, int(port)))

    async def _request(self, writer: asyncio.StreamWriter, traffic: str, **fields: Any) -> None:
        header = {"protocol": PROTOCOL, "name": self.name, "fingerprint": self.fingerprint}
        await self._send(writer, traffic, **header, **fields)

    async def _compare(self, peer: Peer) -> dict[str, tuple[Any, Any]] | None:
        try:
            async with asyncio.timeout(self._settings.timeout):
                reader, writer = await self._connect(peer)
                try:
                    await self._request(writer, "handshake")
                    answer = await read_message(reader)
                finally:
                    writer.close()
        except (OSError, EOFError, TimeoutError):
            return None
        if not answer["refused"]:
            return {}
        there = dict(answer["settings"]) | {"protocol": answer["protocol"]}
        here = self._description | {"protocol": PROTOCOL}
        return {key: (there.get(key), here.get(key)) for key in sorted(there | here) if there.get(key) != here.get(key)}


def kind(key: str) -> str:
    """The first word of a key: the name of an outer step, or another kind of payload."""
    return key.partition(" ")[0]


class OtherRunError(Exception):
    """The peer is of another run, and will never answer."""


@dataclass
class PartialPayload:
    """A payload of which some bytes have arrived, and what all of it must be."""

    data: bytearray = field(default_factory=bytearray)
    size: int = -1
    digest: str = ""

    def expect(self, size: int, digest: str) -> None:
        """Set size and digest as the sender announces them; if they have changed, start again."""
        if (self.size, self.digest) not in ((size, digest), (-1, "")):
            self.data.clear()
        self.size, self.digest = size, digest

    def check(self) -> None:
        """Raise CorruptFrame, and drop all bytes, if they are not the announced ones."""
        digest, size = xxhash.xxh3_128_hexdigest(self.data), len(self.data)
        if (size, digest) != (self.size, self.digest):
            self.data.clear()
            raise CorruptFrame(f"{size} bytes have the checksum {digest}, not {self.digest} of {self.size}")
