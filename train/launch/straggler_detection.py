"""Which of four syndromes a run has, and whom it points to: hanging or slow, by communication or by something else.

A step is synchronous: whoever is late makes all wait, so the steps of all are equally slow and prove nothing. What a
process does *by itself* between two waits does: reading data, writing, being stopped. Pure functions of what the
supervisor saw; JAX-free.

                 not communication                            communication
    hang         one is behind, elsewhere than in the         all wait in the same step: links are measured
                 step, or gives no sign of life
    slow         one takes longer by itself than the others   all wait longer than they used to: links are measured

A process that waits inside its step cannot say for whom: an accelerator that computes slowly looks like a slow link
until the links are measured and found good. `meshwright doctor --cluster` tells them apart.

Sources: C4 (arXiv:2406.04594), whose syndromes these are; MegaScale (NSDI'24), whose heat map draws `Observed.own`.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .network_probe import Culprit, Links, culprits

WAIT = "wait"  # what a process does while it waits for the step's result, and so perhaps for others
DEAF = 5.0  # seconds without a sign of life: a heartbeat comes every half
EXCESS = 0.3  # of a step that one process takes by itself beyond the others: it is slow
NOTICED = 0.02  # seconds a step below which nobody is called slow
SLOWER = 2.0  # times the usual step: the run is slow


@dataclass(frozen=True)
class Observed:
    """A process as the supervisor sees it."""

    step: int  # updates done
    doing: str  # WAIT, or what it does by itself
    silent: float  # seconds since its last sign of life
    own: float | None = None  # seconds a step that it does not wait, recently; None: not known yet
    took: float | None = None  # seconds a step, recently


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong, and with whom."""

    kind: str  # hang | slow
    communication: bool
    suspects: tuple[int, ...]  # processes; () where nothing points to one
    evidence: str

    def __str__(self) -> str:
        where = "communication" if self.communication else "not communication"
        who = f"process{'es' if len(self.suspects) > 1 else ''} {', '.join(map(str, self.suspects))}: "
        return f"{self.kind}, {where}: {who if self.suspects else ''}{self.evidence}"


def hanging(seen: Mapping[int, Observed], links: Links | None = None) -> Diagnosis | None:
    """Why nothing moves, given that nothing does. None where nobody has reported."""
    if not seen:
        return None
    if deaf := [number for number, one in seen.items() if one.silent > DEAF]:
        longest = max(seen[number].silent for number in deaf)
        return Diagnosis("hang", False, tuple(deaf), f"no sign of life for {longest:.0f} s: stopped, or its machine is")
    arrived = max(one.step for one in seen.values())
    if behind := [number for number, one in seen.items() if one.step < arrived]:
        doing = seen[behind[0]].doing
        return Diagnosis("hang", False, tuple(behind), f"at step {seen[behind[0]].step} ({doing}), others at {arrived}")
    if elsewhere := [number for number, one in seen.items() if one.doing != WAIT]:
        if len(elsewhere) < len(seen):
            return Diagnosis("hang", False, tuple(elsewhere), f"busy with {seen[elsewhere[0]].doing}, others wait")
        return Diagnosis("hang", False, (), f"all are busy with {seen[elsewhere[0]].doing}")
    return between("hang", links, f"all wait in step {arrived + 1}")


def slow(seen: Mapping[int, Observed], *, usual: float | None, links: Links | None = None) -> Diagnosis | None:
    """Why steps take longer than they must; None where they do not.

    `usual` is the seconds of the run's usual step; None where that is not known yet.
    """
    own = {number: one.own for number, one in seen.items() if one.own is not None}
    took = [one.took for one in seen.values() if one.took is not None]
    if len(own) < 2 or not took:
        return None
    step, median = statistics.median(took), statistics.median_low(own.values())
    late = {number: seconds - median for number, seconds in own.items()}
    if suspects := [number for number, more in late.items() if more > max(EXCESS * step, NOTICED)]:
        worst = max(suspects, key=lambda number: late[number])
        told = f"{own[worst]:.2f} s a step by itself, where the median process takes {median:.2f} s"
        return Diagnosis("slow", False, tuple(suspects), f"{told} of a step of {step:.2f} s")
    if usual is not None and step > max(SLOWER * usual, usual + NOTICED):
        return between("slow", links, f"steps take {step:.2f} s, {usual:.2f} s before, and nobody works longer")
    return None


def between(kind: str, links: Links | None, evidence: str) -> Diagnosis:
    """It is between processes, or in a device: the links say which, where they were measured."""
    if links is None:
        return Diagnosis(kind, True, (), f"{evidence}; the links were not measured")
    if found := culprits(links):
        return Diagnosis(kind, True, named(found), f"{evidence}; {'; '.join(map(told, found[:3]))}")
    return Diagnosis(kind, False, (), f"{evidence}, and links are good: a device; run meshwright doctor --cluster")


def named(found: Sequence[Culprit]) -> tuple[int, ...]:
    """Processes of the worst culprit."""
    return found[0].processes


def told(culprit: Culprit) -> str:
    """A culprit in words."""
    if len(culprit.processes) == 1:
        return f"process {culprit.processes[0]}: {culprit.evidence}"
    return f"the link between {culprit.processes[0]} and {culprit.processes[1]}: {culprit.evidence}"
