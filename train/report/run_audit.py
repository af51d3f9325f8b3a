"""An audit of a run's history from the files that it wrote: `meshwright audit RUN [--against RUN]`.

It reads the event log and the sample log (`logging.ledger`), and the manifests of two runs that should have the same
final state. It does not know how a run recovers; it checks the history against five rules, as Jepsen does:

    no committed step was lost        a restart continues from the newest committed step, or a later one
    no step was committed twice       committed steps increase, except after a checkpoint was quarantined
    no step was left out or repeated  in every epoch each process did the steps after the restored one, in order
    every sample was consumed once    by the final updates: none missing or repeated, and the same rows in every epoch
                                      (of an island: its own samples, without steps that it took from another island)
    one epoch at a time               no process wrote for an epoch after a later one had begun

and, against another run: the same samples, and equal fingerprints of every array of the state. The final update of a
step is the one that no later epoch computed again.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...configs.errors import MeshwrightError, UserError
from ..core.event_log import read_events
from ..core.run_directory import read_config
from ..core.sample_log import read_sample_log

Event = Mapping[str, Any]
Lines = Mapping[int, Sequence[Event]]  # process -> lines of its sample log


@dataclass(frozen=True)
class Verdict:
    """Whether the run kept one promise."""

    promise: str
    passed: bool
    detail: str  # the first breach, or what was checked


def audit(directory: Path, *, against: Path | None = None) -> list[Verdict]:
    """Check every promise of the run in `directory`. Raises UserError if it has no sample log."""
    config, events, lines = read_config(directory), read_events(directory), read_sample_log(directory)
    if not lines:
        raise UserError(f"{directory}: no sample log to audit; train with logging.ledger=true")
    restores = sum(event["event"] == "restore" for event in events)
    commits = sum(event["event"] == "commit" for event in events)
    final = final_updates(lines)
    batch = config.data.global_batch
    rows = config.islands.local_rows(batch) if config.islands else range(batch)
    copied = {event["step"] for event in events if event["event"] == "bootstrap"}
    sample_breaches = misused_samples(lines, final, batch=batch, rows=rows, copied=copied)
    checks = {
        "no committed step was lost": (lost_commits(events), f"{commits} commits, {restores} restores"),
        "no step was committed twice": (repeated_commits(events), f"{commits} commits"),
        "no step was left out or repeated": (disordered_steps(lines), f"{len(final)} steps"),
        "every sample was consumed once": (sample_breaches, f"{len(final) * len(rows)} samples"),
        "one epoch at a time": (overlapping_epochs(lines), f"{len(epochs(lines))} epochs"),
    }
    verdicts = []
    for promise, (breaches, checked) in checks.items():
        breach = next(breaches, None)
        verdicts.append(Verdict(promise, breach is None, breach or checked))
    if against is not None:
        verdicts += [same_samples(lines, read_sample_log(against)), same_state(directory, against)]
    return verdicts


def lost_commits(events: Sequence[Event]) -> Iterator[str]:
    """Yield restarts from a step before a committed one that was not quarantined."""
    committed, quarantined = [0], set[int]()
    for event in events:
        if event["event"] == "commit":
            committed.append(event["step"])
            quarantined.discard(event["step"])
        elif event["event"] == "quarantine":
            quarantined.add(event["step"])
        elif event["event"] == "bootstrap":
            committed = [0, *(step for step in committed if step <= event["step"])]
        elif event["event"] in ("start", "restore"):
            newest = max(committed)
            if event["step"] < newest and newest not in quarantined:
                yield f"step {newest} was committed, and the run continued from {event['step']}"
            committed = [event["step"]]


def repeated_commits(events: Sequence[Event]) -> Iterator[str]:
    """Yield steps that were committed again; an island may copy an earlier state, and quarantines later checkpoints."""
    newest = -1
    for event in events:
        if event["event"] in ("quarantine", "bootstrap"):
            newest = min(newest, event["step"] - 1)
        elif event["event"] == "commit":
            if event["step"] <= newest:
                yield f"step {event['step']} was committed after {newest}"
            newest = event["step"]


def disordered_steps(lines: Lines) -> Iterator[str]:
    """Yield steps of a process that do not follow the one before in the same epoch."""
    for process, process_lines in lines.items():
        reached: dict[int, int] = {}  # epoch -> step
        for line in process_lines:
            epoch = line["epoch"]
            if "from" in line:
                reached[epoch] = line["from"]
            elif line["step"] != reached.get(epoch, -2) + 1:
                yield f"process {process} did step {line['step']} after {reached.get(epoch)} in epoch {epoch}"
                reached[epoch] = line["step"]
            else:
                reached[epoch] += 1


def epochs(lines: Lines) -> list[int]:
    """The epochs that started from a step, in order."""
    return sorted({line["epoch"] for process_lines in lines.values() for line in process_lines})


def final_updates(lines: Lines) -> dict[int, int]:
    """Step -> the epoch of its final update."""
    final: dict[int, int] = {}
    for epoch in epochs(lines):
        epoch_lines = [line for process_lines in lines.values() for line in process_lines if line["epoch"] == epoch]
        start = min((line["from"] for line in epoch_lines if "from" in line), default=0)
        final = {step: earlier for step, earlier in final.items() if step <= start}
        final |= {line["step"]: epoch for line in epoch_lines if "step" in line}
    return final


def final_samples(lines: Lines, final: Mapping[int, int]) -> Iterator[tuple[int, int, str]]:
    """Yield (step, sample, fingerprint) of every row that the `final` updates consumed."""
    for process_lines in lines.values():
        for line in process_lines:
            if "step" in line and final.get(line["step"]) == line["epoch"]:
                for offset, row in enumerate(line["rows"]):
                    yield line["step"], line["first"] + offset, row


def misused_samples(
    lines: Lines, final: Mapping[int, int], *, batch: int, rows: range, copied: Collection[int]
) -> Iterator[str]:
    """Yield missing steps, steps whose final update did not consume each sample once, and samples that changed.

    `rows` are those to consume of each global batch of `batch`. `copied` are steps whose state was copied from another
    island, which did the steps that are missing before them.
    """
    for before, after in pairwise([0, *sorted(final)]):
        if after > before + 1 and after - 1 not in copied:
            yield f"step {before + 1} is missing"
    consumed: dict[int, Counter[int]] = {step: Counter() for step in final}
    for step, sample, _ in final_samples(lines, final):
        consumed[step][sample] += 1
    for step, counts in sorted(consumed.items()):
        expected = {(step - 1) * batch + row for row in rows}
        # Processes that share rows (a tensor axis across hosts) consume all of them equally often.
        if counts.keys() != expected or len(set(counts.values())) != 1:
            repeated = {sample for sample in counts if counts[sample] != min(counts.values())}
            wrong = sorted((counts.keys() ^ expected) or repeated)
            yield f"step {step}: samples {wrong[:4]} are missing, foreign or repeated"
    fingerprints: dict[int, str] = {}
    for process, process_lines in lines.items():
        for line in process_lines:
            for sample, row in enumerate(line.get("rows", ()), line.get("first", 0)):
                if fingerprints.setdefault(sample, row) != row:
                    yield f"sample {sample} had another content when process {process} consumed it again"


def overlapping_epochs(lines: Lines) -> Iterator[str]:
    """Yield processes with a line of an epoch after one of a later epoch."""
    for process, process_lines in lines.items():
        for before, after in pairwise(process_lines):
            if after["epoch"] < before["epoch"]:
                yield f"process {process} wrote for epoch {after['epoch']} after {before['epoch']} had begun"


def same_samples(lines: Lines, reference: Lines) -> Verdict:
    """Whether both runs consumed the same rows in the steps that both did."""
    rows, expected = ({n: row for _, n, row in final_samples(log, final_updates(log))} for log in (lines, reference))
    common = rows.keys() & expected.keys()
    different = sorted(sample for sample in common if rows[sample] != expected[sample])
    detail = f"sample {different[0]} differs" if different else f"{len(common)} samples of both"
    return Verdict("the samples are the other run's", bool(common) and not different, detail)


def same_state(directory: Path, reference: Path) -> Verdict:
    """Whether the newest step that both runs committed has equal fingerprints of every array."""
    from ...checkpoint import manifest
    from ...checkpoint.checkpoint_directory import CheckpointDirectory

    promise = "the state is the other run's, bit for bit"
    checkpoints = [CheckpointDirectory((run / "checkpoints").absolute()) for run in (directory, reference)]
    steps = [sorted(checkpoint.steps) for checkpoint in checkpoints]
    if not (common := set(steps[0]) & set(steps[1])):
        return Verdict(promise, False, f"no step is committed in both: {steps[0]} and {steps[1]}")
    step = max(common)
    blocks, expected = (
        {name: array.blocks for name, array in manifest.read(checkpoint.path(step)).arrays.items()}
        for checkpoint in checkpoints
    )
    different = sorted(name for name in blocks.keys() | expected.keys() if blocks.get(name) != expected.get(name))
    detail = f"step {step}: {len(blocks)} arrays"
    if different:
        detail = f"step {step}: {len(different)} of {len(blocks)} arrays differ, e.g. {different[0]}"
    return Verdict(promise, not different, detail)


def render_verdicts(verdicts: Sequence[Verdict], *, as_json: bool) -> str:
    """The verdicts as text, a line each, or as JSON."""
    if as_json:
        rows = [{"promise": v.promise, "held": v.passed, "detail": v.detail} for v in verdicts]
        return json.dumps(rows, indent=1)
    return "\n".join(f"{'kept  ' if v.passed else 'BROKEN'}  {v.promise:42}  {v.detail}" for v in verdicts)


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0 if every promise was kept, else 1."""
    return 0 if all(verdict.passed for verdict in verdicts) else MeshwrightError.exit_code
