"""SIGTERM and Ctrl-C as a request to stop, which the program checks between steps. JAX-free."""

import signal
from types import FrameType


class StopSignals:
    """Sets `requested` on SIGTERM or Ctrl-C while in a `with`. A second Ctrl-C raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._previous_handlers = {
            signum: signal.signal(signum, self._request) for signum in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
