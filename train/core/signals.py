"""SIGTERM and Ctrl-C as a request that is answered when it suits. JAX-free."""

import signal
from types import FrameType


class StopSignals:
    """SIGTERM and Ctrl-C as a request: `asked`. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {signum: signal.signal(signum, self._ask) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self.asked and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
