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

Sources: C4 (arXiv:2406.04594), whose syndromes these are; MegaScale (NSDI'24), whose heat map draws
`ProcessActivity.busy_seconds`.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from .network_probe import LinkFault, Links, find_link_faults

WAIT = "wait"  # the activity of a process that waits for its step's result, and so perhaps for others
SILENCE_LIMIT = 5.0  # seconds without a heartbeat after which a process is stopped: one comes every half
EXCESS = 0.3  # of a step that one process takes by itself beyond the others: it is slow
MIN_EXCESS = 0.02  # seconds a step below which nobody is called slow
SLOWDOWN = 2.0  # times the usual step: the run is slow


@dataclass(frozen=True)
class ProcessActivity:
    """A process as the supervisor sees it."""

    step: int  # updates done
    activity: str  # WAIT, or what it does by itself
    silent_seconds: float  # since its last heartbeat
    busy_seconds: float | None = None  # a step that it does not wait, recently; None: not known yet
    step_seconds: float | None = None  # a step, recently


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong, and with which processes."""

    kind: str  # hang | slow
    communication: bool
    suspects: tuple[int, ...]  # processes; () where nothing points to one
    evidence: str

    @property
    def syndrome(self) -> str:
        """Kind and cause, e.g. `hang, not communication`."""
        return f"{self.kind}, {'communication' if self.communication else 'not communication'}"

    def __str__(self) -> str:
        suspects = f"process{'es' if len(self.suspects) > 1 else ''} {', '.join(map(str, self.suspects))}: "
        return f"{self.syndrome}: {suspects if self.suspects else ''}{self.evidence}"


def diagnose_hang(processes: Mapping[int, ProcessActivity], links: Links | None = None) -> Diagnosis | None:
    """Why nothing moves, given that nothing does. None where nobody has reported."""
    if not processes:
        return None
    if silent := [index for index, process in processes.items() if process.silent_seconds > SILENCE_LIMIT]:
        longest = max(processes[index].silent_seconds for index in silent)
        return Diagnosis(
            "hang", False, tuple(silent), f"no sign of life for {longest:.0f} s: stopped, or its machine is"
        )
    step = max(process.step for process in processes.values())
    if behind := [index for index, process in processes.items() if process.step < step]:
        first = processes[behind[0]]
        return Diagnosis("hang", False, tuple(behind), f"at step {first.step} ({first.activity}), others at {step}")
    if busy := [index for index, process in processes.items() if process.activity != WAIT]:
        activity = processes[busy[0]].activity
        if len(busy) < len(processes):
            return Diagnosis("hang", False, tuple(busy), f"busy with {activity}, others wait")
        return Diagnosis("hang", False, (), f"all are busy with {activity}")
    return diagnose_links("hang", links, f"all wait in step {step + 1}")


def diagnose_slowdown(
    processes: Mapping[int, ProcessActivity], *, usual: float | None, links: Links | None = None
) -> Diagnosis | None:
    """Why steps take longer than they must; None where they do not.

    `usual` is the seconds of the run's usual step; None where that is not known yet.
    """
    busy = {i: process.busy_seconds for i, process in processes.items() if process.busy_seconds is not None}
    step_seconds = [process.step_seconds for process in processes.values() if process.step_seconds is not None]
    if len(busy) < 2 or not step_seconds:
        return None
    step, median = statistics.median(step_seconds), statistics.median_low(busy.values())
    if suspects := [index for index, seconds in busy.items() if seconds - median > max(EXCESS * step, MIN_EXCESS)]:
        worst = max(busy[index] for index in suspects)
        evidence = f"{worst:.2f} s a step by itself, where the median process takes {median:.2f} s"
        return Diagnosis("slow", False, tuple(suspects), f"{evidence} of a step of {step:.2f} s")
    if usual is not None and step > max(SLOWDOWN * usual, usual + MIN_EXCESS):
        evidence = f"steps take {step:.2f} s, {usual:.2f} s before, and nobody works longer"
        return diagnose_links("slow", links, evidence)
    return None


def diagnose_links(kind: str, links: Links | None, evidence: str) -> Diagnosis:
    """Blame a link or a machine where the links were measured and one is slow, else a device.

    `evidence` is what the processes show: all wait.
    """
    if links is None:
        return Diagnosis(kind, True, (), f"{evidence}; the links were not measured")
    if faults := find_link_faults(links):
        descriptions = "; ".join(map(describe_fault, faults[:3]))
        return Diagnosis(kind, True, faults[0].processes, f"{evidence}; {descriptions}")
    return Diagnosis(kind, False, (), f"{evidence}, and links are good: a device; run meshwright doctor --cluster")


def describe_fault(fault: LinkFault) -> str:
    """A link fault as a sentence."""
    if len(fault.processes) == 1:
        return f"process {fault.processes[0]}: {fault.evidence}"
    return f"the link between {fault.processes[0]} and {fault.processes[1]}: {fault.evidence}"
