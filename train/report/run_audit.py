"""Whether a run kept its promises, checked afterwards from what it wrote: `meshwright audit RUN [--against RUN]`.

Reads the journal and the ledger (`logging.ledger`), and the manifests of two runs that should have ended alike. It
knows nothing of how a run recovers; it holds the history to five rules, in the manner of Jepsen:

    no committed step was lost        a restart goes on from the newest committed step, or a later one
    no step was committed twice       committed steps only grow, but behind a checkpoint that was set aside
    no step was left out or repeated  in every epoch each process did the steps after the restored one, in order
    every sample was consumed once    by the steps that stayed: none missing, none twice, the same rows when made again
                                      (of an island: its own; steps that it took from another one are not missing)
    one epoch at a time               no process wrote for an epoch after a later one had begun

and, against another run: the same samples, and equal fingerprints of every array of the state.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...configs.errors import MeshwrightError, UserError
from ..core.event_log import read_events
from ..core.run_directory import read_config
from ..core.sample_log import read_sample_log

Event = Mapping[str, Any]
Lines = Mapping[int, Sequence[Event]]  # process -> its part of the ledger


@dataclass(frozen=True)
class Verdict:
    """What became of one promise."""

    promise: str
    passed: bool
    detail: str  # the first breach, or what was looked at


def audit(directory: Path, *, against: Path | None = None) -> list[Verdict]:
    """Every promise of the run in `directory`, and whether it was kept. Raises UserError where it kept no ledger."""
    config, events, lines = read_config(directory), read_events(directory), read_sample_log(directory)
    if not lines:
        raise UserError(f"{directory}: no ledger to audit; train with logging.ledger=true")
    restores = sum(event["event"] == "restore" for event in events)
    commits = sum(event["event"] == "commit" for event in events)
    stayed = timeline(lines)
    every = config.data.global_batch
    job = config.islands.local_rows(every) if config.islands else range(every)
    taken = {event["step"] for event in events if event["event"] == "bootstrap"}
    misfits = misfed(lines, stayed, every=every, job=job, taken=taken)
    found = [
        verdict("no committed step was lost", lost(events), f"{commits} commits, {restores} restores"),
        verdict("no step was committed twice", committed_twice(events), f"{commits} commits"),
        verdict("no step was left out or repeated", disordered(lines), f"{len(stayed)} steps"),
        verdict("every sample was consumed once", misfits, f"{len(stayed) * len(job)} samples"),
        verdict("one epoch at a time", overlapping(lines), f"{len(epochs(lines))} epochs"),
    ]
    if against is not None:
        found.append(same_samples(lines, read_sample_log(against)))
        found.append(same_state(directory, against))
    return found


def verdict(promise: str, breaches: Iterator[str], looked_at: str) -> Verdict:
    """Kept where there is no breach."""
    first = next(breaches, None)
    return Verdict(promise, first is None, first or looked_at)


def lost(events: Sequence[Event]) -> Iterator[str]:
    """Restarts that went back behind a committed step which nobody had set aside."""
    committed, aside = [0], set[int]()
    for event in events:
        if event["event"] == "commit":
            committed.append(event["step"])
            aside.discard(event["step"])
        elif event["event"] == "quarantine":
            aside.add(event["step"])
        elif event["event"] == "bootstrap":
            committed = [0, *(step for step in committed if step <= event["step"])]
        elif event["event"] in ("start", "restore"):
            newest = max(committed)
            if event["step"] < newest and newest not in aside:
                yield f"step {newest} was committed, and the run went on from {event['step']}"
            committed = [event["step"]]


def committed_twice(events: Sequence[Event]) -> Iterator[str]:
    """Steps that were committed again; an island may take an earlier state, and sets aside what is beyond it."""
    newest = -1
    for event in events:
        if event["event"] in ("quarantine", "bootstrap"):
            newest = min(newest, event["step"] - 1)
        elif event["event"] == "commit":
            if event["step"] <= newest:
                yield f"step {event['step']} was committed after {newest}"
            newest = event["step"]


def disordered(lines: Lines) -> Iterator[str]:
    """Processes whose steps of an epoch are not the next one after the other from where it began."""
    for process, told in lines.items():
        reached: dict[int, int] = {}  # epoch -> step
        for line in told:
            epoch = line["epoch"]
            if "from" in line:
                reached[epoch] = line["from"]
            elif line["step"] != reached.get(epoch, -2) + 1:
                yield f"process {process} did step {line['step']} after {reached.get(epoch)} in epoch {epoch}"
                reached[epoch] = line["step"]
            else:
                reached[epoch] += 1


def epochs(lines: Lines) -> list[int]:
    """The epochs that came as far as going on from a step."""
    return sorted({line["epoch"] for told in lines.values() for line in told})


def timeline(lines: Lines) -> dict[int, int]:
    """Step -> the epoch whose update of it stayed: a later epoch that went on from before it made it anew."""
    stayed: dict[int, int] = {}
    everything = [line for told in lines.values() for line in told]
    for epoch in epochs(lines):
        own = [line for line in everything if line["epoch"] == epoch]
        begun = min((line["from"] for line in own if "from" in line), default=0)
        stayed = {step: owner for step, owner in stayed.items() if step <= begun}
        stayed |= {line["step"]: epoch for line in own if "step" in line}
    return stayed


def samples(lines: Lines, stayed: Mapping[int, int]) -> Iterator[tuple[int, int, str]]:
    """(step, sample, fingerprint) of every row that the steps which stayed were fed."""
    for told in lines.values():
        for line in told:
            if "step" in line and stayed.get(line["step"]) == line["epoch"]:
                for offset, row in enumerate(line["rows"]):
                    yield line["step"], line["first"] + offset, row


def misfed(lines: Lines, stayed: Mapping[int, int], *, every: int, job: range, taken: Collection[int]) -> Iterator[str]:
    """Steps that stayed and were not fed each of their samples once, or that a process of their epoch lacks.

    `job`: the samples to be fed, of each `every`. `taken`: steps that were taken from another island, which made them
    and those before them that this one did not.
    """
    for before, after in pairwise([0, *sorted(stayed)]):
        if after > before + 1 and after - 1 not in taken:
            yield f"step {before + 1} is nobody's"
    fed: dict[int, Counter[int]] = {step: Counter() for step in stayed}
    for step, sample, _ in samples(lines, stayed):
        fed[step][sample] += 1
    for step, counts in sorted(fed.items()):
        wanted = {(step - 1) * every + row for row in job}
        # Processes that share rows (a tensor axis across hosts) feed them all equally often.
        if counts.keys() != wanted or len(set(counts.values())) != 1:
            odd = sorted(
                (counts.keys() ^ wanted) or {sample for sample in counts if counts[sample] != min(counts.values())}
            )
            yield f"step {step}: samples {odd[:4]} are missing, foreign or repeated"
    seen: dict[int, str] = {}
    for process, told in lines.items():
        for line in told:
            for offset, row in enumerate(line.get("rows", ())):
                if seen.setdefault(line["first"] + offset, row) != row:
                    yield f"sample {line['first'] + offset} was another one when process {process} fed it again"


def overlapping(lines: Lines) -> Iterator[str]:
    """Lines of an epoch behind those of a later one."""
    for process, told in lines.items():
        for before, after in pairwise(told):
            if after["epoch"] < before["epoch"]:
                yield f"process {process} wrote for epoch {after['epoch']} after {before['epoch']} had begun"


def same_samples(lines: Lines, others: Lines) -> Verdict:
    """Whether both runs were fed the same rows, as far as both went."""
    own, theirs = ({n: row for _, n, row in samples(one, timeline(one))} for one in (lines, others))
    shared = own.keys() & theirs.keys()
    odd = sorted(sample for sample in shared if own[sample] != theirs[sample])
    detail = f"sample {odd[0]} differs" if odd else f"{len(shared)} samples of both"
    return Verdict("the samples are the other run's", bool(shared) and not odd, detail)


def same_state(directory: Path, other: Path) -> Verdict:
    """Whether the newest step that both runs committed has equal fingerprints of every array."""
    from ...checkpoint import manifest
    from ...checkpoint.checkpoint_directory import CheckpointDirectory

    promise = "the state is the other run's, bit for bit"
    shelves = [CheckpointDirectory((one / "checkpoints").absolute()) for one in (directory, other)]
    shared = set(shelves[0].steps) & set(shelves[1].steps)
    if not shared:
        steps = [sorted(shelf.steps) for shelf in shelves]
        return Verdict(promise, False, f"no step is committed in both: {steps[0]} and {steps[1]}")
    step = max(shared)
    own, theirs = (manifest.read(shelf.path(step)).arrays for shelf in shelves)
    odd = sorted(
        name
        for name in own.keys() | theirs.keys()
        if name not in own or name not in theirs or own[name].blocks != theirs[name].blocks
    )
    detail = (
        f"step {step}: {len(odd)} of {len(own)} arrays differ, e.g. {odd[0]}"
        if odd
        else f"step {step}: {len(own)} arrays"
    )
    return Verdict(promise, not odd, detail)


def render_verdicts(verdicts: Sequence[Verdict], *, as_json: bool) -> str:
    """A line for each promise, or JSON."""
    if as_json:
        return json.dumps([asdict(one) for one in verdicts], indent=1)
    return "\n".join(f"{'kept  ' if one.passed else 'BROKEN'}  {one.promise:42}  {one.detail}" for one in verdicts)


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0 only where every promise was kept."""
    return 0 if all(one.passed for one in verdicts) else MeshwrightError.exit_code
