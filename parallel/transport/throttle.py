"""A slow link on a fast one: a token bucket on the sender, and a delay before each message. No JAX."""

import asyncio
import time
from collections.abc import Callable

BURST = 0.05  # seconds of the rate that may leave at once


class Throttle:
    """All connections of one sender share it. `bandwidth` bits a second, `latency` seconds; `clock` is monotonic."""

    def __init__(
        self, *, bandwidth: float | None = None, latency: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = None if bandwidth is None else bandwidth / 8  # bytes a second
        self._latency, self._clock = latency, clock
        self._free = -float("inf")  # when the link has carried everything it was given

    async def wait_latency(self) -> None:
        """Wait for what a message needs to cross the link, however short it is."""
        if self._latency:
            await asyncio.sleep(self._latency)

    async def wait_to_send(self, size: int) -> None:
        """Wait until `size` more bytes may leave."""
        if (wait := self.charge(size)) > 0:
            await asyncio.sleep(wait)

    def charge(self, size: int) -> float:
        """Seconds until the link has carried `size` bytes more, which are charged now; up to a burst is free."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        self._free = max(self._free, now - BURST) + size / self._rate
        return self._free - now
