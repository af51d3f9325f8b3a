"""When the processes of a run form up anew: fewer after a loss, more when a host is back. JAX-free.

A lost host is waited for, `elastic.replace` seconds, since a replacement costs nothing but the wait. Then the run goes
on with the first mesh option that is left. One that is smaller than it could be is stopped between two steps, saved,
and started on the larger mesh once the hosts have been back for `elastic.settle` seconds.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ...configs.sections.fault_tolerance import ElasticConfig
from .mesh_options import Assignment, MeshOption, choose_assignment

Slots = Callable[[], Collection[int]]


@dataclass
class Regrouping:
    """The mesh options of a run, the state of its slots, and the assignment of the epoch."""

    options: Sequence[MeshOption]  # the preferred first
    settings: ElasticConfig
    available_slots: Slots
    drained_slots: Slots  # taken out by hand
    unreliable_slots: Slots  # with too many failures
    current: Assignment | None = None  # of the epoch
    larger_since: float | None = None  # time since which a larger mesh has been possible

    def rank(self, assignment: Assignment | None) -> int:
        """The position of an assignment's option in the list, 0 the best; None comes last."""
        return len(self.options) if assignment is None else self.options.index(assignment.option)

    def wait_for_assignment(
        self, *, stopped: Callable[[], bool], clock: Callable[[], float], sleep: Callable[[float], None]
    ) -> Assignment | None:
        """The assignment of the next epoch: as good as the one before, or what is left after `elastic.replace`
        seconds.

        Slots that are unreliable or drained are not waited for, and nothing is once `stopped()`. None where no mesh
        fits; where one would fit if the missing slots came, they are waited for as long as a start may take.
        """
        began, best_before = clock(), self.rank(self.current) if self.current else 0
        while True:
            available, drained = (
                set(self.available_slots()),
                set(self.drained_slots()),
            )  # read once: one consistent view
            assignment = choose_assignment(self.options, available - drained, unreliable=self.unreliable_slots())
            all_slots = set(range(self.options[0].processes)) | available
            possible = choose_assignment(self.options, all_slots - drained)  # drained slots do not come
            good_enough = best_before if possible is None else max(best_before, self.rank(possible))
            with_unreliable = choose_assignment(self.options, available - drained)
            fits_now = assignment or choose_assignment(self.options, available)
            timeout = self.settings.replace if fits_now else max(self.settings.replace, self.settings.start_timeout)
            if self.rank(with_unreliable) <= good_enough or clock() - began >= timeout or stopped():
                self.larger_since = None
                return assignment
            sleep(0.1)

    def stop_reason(self, *, now: float) -> str | None:
        """Why the epoch should be stopped to form up anew; None where it should not."""
        drained = set(self.drained_slots())
        if in_use := sorted(set(self.current.slots) & drained):
            return f"slots {in_use} were drained"
        best = choose_assignment(
            self.options, set(self.available_slots()) - drained, unreliable=self.unreliable_slots()
        )
        if self.rank(best) >= self.rank(self.current):
            self.larger_since = None
            return None
        self.larger_since = now if self.larger_since is None else self.larger_since
        if now - self.larger_since < self.settings.settle:
            return None
        return f"{best.option.processes} processes fit again, on {best.option.mesh}"


def change_event(before: Assignment, after: Assignment, *, options: Sequence[MeshOption]) -> str | None:
    """The event of a change between two epochs: shrink, grow, move (other slots); None for no change."""
    if before == after:
        return None
    old, new = (options.index(assignment.option) for assignment in (before, after))
    return "move" if old == new else "shrink" if old < new else "grow"
