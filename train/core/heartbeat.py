"""What a process tells its supervisor: the step it has done and what comes next. JAX-free.

A process that is alive proves nothing; one that makes steps does. A thread of its own sends the newest word and,
between steps, heartbeats: so a process that was stopped can be told from one that waits. Without a supervisor nothing
is told. It also counts the seconds spent on each thing a process does: what it did by itself between two waits tells
who keeps the others waiting (`detection`).
"""

import threading
import time

from ...configs.errors import MeshwrightError
from .fence import Fence
from .process_env import World
from .rendezvous import Client, Refused

OFTEN = 0.1  # seconds between two words: short steps need not tell each
HEARTBEAT = 0.5  # seconds between two words that say nothing new
ERRS = "errs"  # what comes next, of a process whose device was found out: it ends
PATIENCE = 60.0  # seconds without an answer after which the supervisor is gone


def member(world: World) -> str:
    """The name of a process among all epochs' processes."""
    return f"{world.epoch}/{world.process}"


class Progress:
    """Reports of one process. `fence` is asked at every one: a process of an older epoch ends here."""

    def __init__(self, world: World, fence: Fence) -> None:
        self._fence, self._name, self._address = fence, member(world), world.rendezvous
        self._word: tuple[int, str] = (0, "start")
        self._spent: dict[str, float] = {}  # seconds, by what was done
        self._doing, self._since = "start", time.monotonic()
        self._ended = threading.Event()
        self._gone: str | None = None  # why the supervisor is
        if self._address:
            threading.Thread(target=self._tell, name="progress", daemon=True).start()

    def report(self, step: int, phase: str = "step") -> None:
        """`step` updates are done, `phase` comes next.

        Raises Fenced where the run belongs to another epoch, MeshwrightError where the supervisor has been gone for a
        minute: it would start this run again without knowing of this process.
        """
        self._fence.check()
        if self._gone is not None:
            raise MeshwrightError(f"no answer from the launcher for {PATIENCE:.0f} s: {self._gone}; ending")
        self._word = (step, phase)

    def waits(self, phase: str) -> None:
        """Nothing hangs: as many updates as before are done, and `phase` takes its time."""
        self.report(self._word[0], phase)

    def enters(self, doing: str) -> None:
        """From now on this process does `doing`; `detection.WAIT`: it waits for the step, and so for others."""
        now = time.monotonic()
        self._spent = self._spent | {self._doing: self._spent.get(self._doing, 0.0) + now - self._since}
        self._doing, self._since = doing, now

    def timers(self) -> dict[str, object]:
        """What is done now, and the seconds spent on each thing so far."""
        spent, doing, since = self._spent, self._doing, self._since
        return {"doing": doing, "spent": spent | {doing: spent.get(doing, 0.0) + time.monotonic() - since}}

    def close(self) -> None:
        """Say no more."""
        self._ended.set()

    def _tell(self) -> None:
        told, beats, spoken = None, 0, 0.0
        answered = time.monotonic()
        with Client(self._address, self._name, ttl=1e9) as client:
            while not self._ended.wait(OFTEN):
                now, word = time.monotonic(), self._word
                if word == told and now - spoken < HEARTBEAT:
                    continue
                try:
                    if client.ticket < 0:
                        client.join()
                    client.beat({"step": word[0], "phase": word[1], "beats": beats, **self.timers()})
                    told, beats, spoken, answered = word, beats + 1, now, now
                except (OSError, Refused) as error:
                    if now - answered > PATIENCE:
                        self._gone = str(error)
