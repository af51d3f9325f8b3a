"""The post office of an island: what it has for the others lies there until they fetch it. No JAX.

    office = Office(me, host="0.0.0.0", port=0, ...)        serves in a thread of its own
    office.publish(key, payload)                            whoever asks for `key` gets these bytes
    office.collect(key, peers, deadline=...)                everybody's payload of that key: bytes, or why not

Receivers ask, so nothing arrives that was not expected, and nothing arrives twice: a transfer that was cut is asked for
again from the last byte that arrived whole, as a payload that was damaged is from its start. A payload belongs to one
life of its sender (`ticket`): an island that crashed and came back has others, and the halves are never joined.

Both ends show the run they are of (`fingerprint`); another run's islands are refused.
"""

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import xxhash

from .framing import CHUNK, CorruptFrame, encode_frame, encode_message, read_frame, read_message
from .throttle import Throttle

PROTOCOL = 2
KEPT = 2  # payloads an office keeps of each kind and reader; older ones nobody asks for any more
AGAIN = 0.25  # seconds before the first further attempt; doubled for each one that brings nothing


class Peer(NamedTuple):
    """An island in one of its lives."""

    name: str
    ticket: int
    address: str  # host:port of its office


class Held(NamedTuple):
    """A payload on the shelf."""

    ticket: int  # of the life whose payload it is
    payload: bytes
    digest: str  # XXH3 of it, 128 bits
    reader: str | None  # the only one who will ask for it


class FetchFailure(NamedTuple):
    """Why a payload did not arrive."""

    reason: str


@dataclass
class TransferCounters:
    """What an office has done since it opened, in bytes and events."""

    sent_bytes: int = 0  # written to other islands: payloads, their frames, and requests
    received_bytes: int = 0  # of payloads, frame by frame
    resumed: int = 0  # transfers that went on after a cut
    corrupted: int = 0  # frames and payloads that were damaged
    by_kind: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # sent, by the first word of the key


class ServerSettings(NamedTuple):
    """How an office behaves; seconds, and a link."""

    timeout: float = 30.0  # without a byte
    wait_seconds: float = 10.0  # a question for what is not there yet, before it is answered that it is not
    retries: int = 3
    throttle: Throttle | None = None


class PayloadServer:
    """Serves payloads and fetches others'. `fingerprint` is of the run, `description` the settings that
    tell two runs apart.

    `wanted` is called, in the office's thread, with a key that somebody asks for and that is not there yet.
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
        self._wanted, self._ticket = on_missing, -1
        self.active_sends = 0  # payloads on their way to others
        self._shelf: dict[str, Held] = {}
        self._news = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="office", daemon=True)
        self._thread.start()
        self._server = self._call(asyncio.start_server(self._serve, host, port))
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Serve no more; transfers under way are cut."""

        async def end() -> None:
            self._server.close()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def publish(self, key: str, payload: bytes, *, ticket: int, reader: str | None = None) -> None:
        """Have `payload` for whoever asks this life (`ticket`) for `key`; the oldest of many goes.

        One that is for `reader` alone goes when that one has it.
        """
        self._call(self._put(key, Held(ticket, payload, xxhash.xxh3_128_hexdigest(payload), reader)))

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

        A peer that has nothing of that key yet is asked again for `patience` seconds, and as long as it is `alive`,
        a question that is put in the office's thread.
        """

        async def all_of_them() -> dict[str, bytes | FetchFailure]:
            found = await asyncio.gather(*(self._fetch(key, peer, deadline, patience, alive) for peer in peers))
            return {peer.name: one for peer, one in zip(peers, found, strict=True)}

        return self._call(all_of_them())

    def compare_settings(self, peer: Peer) -> dict[str, tuple[Any, Any]] | None:
        """Settings in which `peer` is of another run: key -> (there, here); {} where none. None: it does not answer."""
        return self._call(self._compare(peer))

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ---- serving

    async def _put(self, key: str, held: Held) -> None:
        self._shelf.pop(key, None)
        self._shelf[key] = held
        alike = [one for one, what in self._shelf.items() if (kind(one), what.reader) == (kind(key), held.reader)]
        for old in alike[:-KEPT]:
            del self._shelf[old]
        self._news.set()
        self._news = asyncio.Event()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._settings.timeout):
                asked = await read_message(reader)
            await self._answer(asked, reader, writer)
        except (OSError, EOFError, TimeoutError, KeyError, TypeError):
            pass  # whoever asked asks again
        finally:
            writer.close()

    async def _answer(
        self, asked: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if asked["protocol"] != PROTOCOL or asked["fingerprint"] != self.fingerprint:
            await self._say(writer, "handshake", refused=True, protocol=PROTOCOL, settings=self._description)
            return
        if "key" not in asked:
            await self._say(writer, "handshake", refused=False)
            return
        key, offset, ticket = asked["key"], int(asked["offset"]), int(asked["ticket"])
        held = await self._awaited(key, ticket)
        if held is None:
            await self._say(writer, kind(key), absent=True)
            return
        self.active_sends += 1
        try:
            await self._give(kind(key), held, offset, writer)
            if held.reader == asked["name"]:
                await self._within(read_message(reader))  # that it has it: what was written may be on its way for long
                if self._shelf.get(key) is held:
                    del self._shelf[key]
        finally:
            self.active_sends -= 1

    async def _give(self, what: str, held: Held, offset: int, writer: asyncio.StreamWriter) -> None:
        await self._say(writer, what, size=len(held.payload), digest=held.digest, confirm=held.reader is not None)
        view = memoryview(held.payload)
        for start in range(offset, len(view), CHUNK):
            await self._write(writer, what, encode_frame(view[start : start + CHUNK]))

    async def _awaited(self, key: str, ticket: int) -> Held | None:
        """The payload, waited for a while: it may be a moment away. None: not there, or of another life."""
        until = time.monotonic() + self._settings.wait_seconds
        while True:
            held = self._shelf.get(key)
            if held is not None:
                return held if held.ticket == ticket else None
            self._wanted(key)
            try:
                async with asyncio.timeout(max(until - time.monotonic(), 0)):
                    await self._news.wait()
            except TimeoutError:
                return None

    async def _say(self, writer: asyncio.StreamWriter, what: str, **fields: Any) -> None:
        await self._throttle.wait_latency()
        await self._write(writer, what, encode_message(**fields))

    async def _write(self, writer: asyncio.StreamWriter, what: str, data: bytes) -> None:
        await self._throttle.wait_to_send(len(data))
        writer.write(data)
        async with asyncio.timeout(self._settings.timeout):
            await writer.drain()
        self.counters.sent_bytes += len(data)
        self.counters.by_kind[what] += len(data)

    # ---- fetching

    async def _fetch(
        self, key: str, peer: Peer, deadline: float, patience: float, alive: Callable[[Peer], bool]
    ) -> bytes | FetchFailure:
        arrived, attempts, began = Arriving(), 0, time.monotonic()
        try:
            async with asyncio.timeout(deadline):
                while True:
                    before = len(arrived.data)
                    try:
                        if await self._attempt(key, peer, arrived):
                            return bytes(arrived.data)
                        if not alive(peer):
                            return FetchFailure(f"{peer.name} has gone")
                        if time.monotonic() - began > patience:
                            return FetchFailure(f"{peer.name} had nothing to give within {patience:g} s")
                        continue  # it has not got there yet
                    except Refusal as error:
                        return FetchFailure(str(error))
                    except (OSError, EOFError, TimeoutError, KeyError, ValueError) as error:
                        if isinstance(error, CorruptFrame):
                            self.counters.corrupted += 1
                        attempts = (
                            0 if len(arrived.data) > before and not isinstance(error, CorruptFrame) else attempts + 1
                        )
                        if attempts > self._settings.retries:
                            return FetchFailure(f"{peer.name}: {error or type(error).__name__} ({attempts} attempts)")
                    await asyncio.sleep(AGAIN * 2**attempts)
                    self.counters.resumed += bool(arrived.data)
        except TimeoutError:
            return FetchFailure(f"{peer.name}: {len(arrived.data)} bytes after {deadline:g} s")

    async def _attempt(self, key: str, peer: Peer, arrived: "Arriving") -> bool:
        """Go on with a transfer; whether it has ended. False: the peer has nothing of that key yet."""
        async with asyncio.timeout(self._settings.timeout):
            reader, writer = await self._dialled(peer)
        try:
            request = {"key": key, "ticket": peer.ticket, "offset": len(arrived.data)}
            await self._ask(writer, kind(key), **request)
            told = await self._within(read_message(reader))
            if told.get("refused"):
                raise Refusal(f"{peer.name} is of another run")
            if told.get("absent"):
                return False
            arrived.expect(int(told["size"]), str(told["digest"]))
            while len(arrived.data) < arrived.size:
                frame = await self._within(read_frame(reader))
                arrived.data += frame
                self.counters.received_bytes += len(frame)
            arrived.check()
            if told["confirm"]:
                await self._write(writer, kind(key), encode_message(whole=True))
            return True
        finally:
            writer.close()

    async def _within(self, reading: Any) -> Any:
        async with asyncio.timeout(self._settings.timeout):
            return await reading

    async def _dialled(self, peer: Peer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = peer.address.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async def _ask(self, writer: asyncio.StreamWriter, what: str, **fields: Any) -> None:
        head = {"protocol": PROTOCOL, "name": self.name, "fingerprint": self.fingerprint}
        await self._say(writer, what, **head, **fields)

    async def _compare(self, peer: Peer) -> dict[str, tuple[Any, Any]] | None:
        try:
            async with asyncio.timeout(self._settings.timeout):
                reader, writer = await self._dialled(peer)
                try:
                    await self._ask(writer, "handshake")
                    told = await read_message(reader)
                finally:
                    writer.close()
        except (OSError, EOFError, TimeoutError):
            return None
        if not told["refused"]:
            return {}
        there = dict(told["settings"]) | {"protocol": told["protocol"]}
        here = self._description | {"protocol": PROTOCOL}
        return {key: (there.get(key), here.get(key)) for key in sorted(there | here) if there.get(key) != here.get(key)}


def kind(key: str) -> str:
    """The first word of a key: which meeting, or what else it is."""
    return key.partition(" ")[0]


class Refusal(Exception):
    """The other end will never answer this."""


@dataclass
class Arriving:
    """A payload on its way: what has arrived whole, and what all of it must be."""

    data: bytearray = field(default_factory=bytearray)
    size: int = -1
    digest: str = ""

    def expect(self, size: int, digest: str) -> None:
        """What the sender has; where it is not what it had before, all begins again."""
        if (self.size, self.digest) not in ((size, digest), (-1, "")):
            self.data.clear()
        self.size, self.digest = size, digest

    def check(self) -> None:
        """Raise Corrupt, and forget everything, where it is not what was announced."""
        found = xxhash.xxh3_128_hexdigest(self.data)
        if len(self.data) != self.size or found != self.digest:
            size = len(self.data)
            self.data.clear()
            raise CorruptFrame(f"{size} bytes have the checksum {found}, not {self.digest} of {self.size}")
