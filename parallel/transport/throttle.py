"""Simulates a slow link on a fast one: a token bucket on the sender, and a delay before each message. No JAX."""

import asyncio
import time
from collections.abc import Callable

BURST_SECONDS = 0.05  # of the bandwidth that may leave at once


class Throttle:
    """Limits all connections of one sender. `bandwidth`: bits a second; `latency`: seconds; `clock` is monotonic."""

    def __init__(
        self, *, bandwidth: float | None = None, latency: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = None if bandwidth is None else bandwidth / 8  # bytes a second
        self._latency, self._clock = latency, clock
        self._free = -float("inf")  # time at which the link has carried everything so far

    async def wait_latency(self) -> None:
        """Wait for the time that a message of any size needs to cross the link."""
        if self._latency:
            await asyncio.sleep(self._latency)

    async def wait_to_send(self, size: int) -> None:
        """Wait until `size` more bytes may leave."""
        if (wait := self.charge(size)) > 0:
            await asyncio.sleep(wait)

    def charge(self, size: int) -> float:
        """Add `size` bytes to the link's load; returns the seconds until it has carried them, minus a burst."""
        if self._rate is None:
            return 0.0
        now = self._clock()
        self._free = max(self._free, now - BURST_SECONDS) + size / self._rate
        return self._free - now
