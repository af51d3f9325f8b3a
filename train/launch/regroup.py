"""When the processes of a run form up anew: fewer after a loss, more when a host is back. JAX-free.

A lost host is waited for, `elastic.replace` seconds, since a replacement costs nothing but the wait. Then the run goes
on with the first formation that is left. One that is smaller than it could be is stopped between two steps, saved, and
started on the larger mesh once the hosts have been back for `elastic.settle` seconds.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from .mesh_options import Formation, Team, team

Slots = Callable[[], Collection[int]]


@dataclass
class Regroup:
    """What formations there are, and what became of the slots. `slots()` are usable now, `drained()` taken out."""

    candidates: Sequence[Formation]
    slots: Slots
    drained: Slots
    struck: Slots
    replace: float
    settle: float
    patience: float  # seconds to wait for hosts without which nothing fits
    present: Team | None = None  # the epoch's
    better: float | None = None  # since when a larger formation has been possible

    def found(self) -> Team | None:
        """The best team of this moment."""
        return team(self.candidates, set(self.slots()) - set(self.drained()), struck=self.struck())

    def rank(self, found: Team | None) -> int:
        """How far down the list a team is; none at all comes last."""
        return len(self.candidates) if found is None else self.candidates.index(found.formation)

    def form(
        self, *, enough: Callable[[], bool], clock: Callable[[], float], sleep: Callable[[float], None]
    ) -> Team | None:
        """The team of the next epoch: as good as the one before, or what is left after `replace` seconds.

        A slot that was struck out or drained is not waited for. It waits no longer once `enough()`. None where nothing
        fits; what fits nothing because hosts are missing is waited for as long as a start may take.
        """
        began, wanted = clock(), self.rank(self.present) if self.present else 0
        while True:
            here, out = set(self.slots()), set(self.drained())  # asked once: what is decided is of one moment
            found = team(self.candidates, here - out, struck=self.struck())
            everywhere = set(range(self.candidates[0].processes)) | here
            possible = team(self.candidates, everywhere - out)  # drained slots do not come
            enough_for_now = wanted if possible is None else max(wanted, self.rank(possible))
            replaced = team(self.candidates, here - out)
            patience = self.replace if found or team(self.candidates, here) else self.patience
            if self.rank(replaced) <= enough_for_now or clock() - began >= patience or enough():
                self.better = None
                return found
            sleep(0.1)

    def reason(self, *, now: float) -> str | None:
        """Why the epoch should be stopped to form up anew; None where it should not."""
        if out := sorted(set(self.present.slots) & set(self.drained())):
            return f"slots {out} were drained"
        found = self.found()
        if self.rank(found) >= self.rank(self.present):
            self.better = None
            return None
        self.better = now if self.better is None else self.better
        if now - self.better < self.settle:
            return None
        return f"{found.formation.processes} processes fit again, on {found.formation.mesh}"


def change(before: Team, after: Team, *, candidates: Sequence[Formation]) -> str | None:
    """The name of what happens between two teams: shrink, grow, move (other slots); None for nothing."""
    if before == after:
        return None
    ranks = [candidates.index(one.formation) for one in (before, after)]
    return "move" if ranks[0] == ranks[1] else "shrink" if ranks[0] < ranks[1] else "grow"
