"""`meshwright bench chaos`: a random killer at a run for some minutes, then the run beside one that was left alone.

    meshwright bench chaos --minutes 10

Every few seconds of steps, now and then sooner, one of these happens, by a seeded die: a trainer is killed (SIGKILL),
the first one, the process that coordinates them; one is stopped (SIGSTOP); a slot is lost, its trainer with it, or
comes back. When the time is over the run is asked to stop, and then left alone for its last steps. Then the same
configuration runs undisturbed to the same step, and `audit` compares: parameters and optimizer bit for bit, the
samples, and the rules of the journals. The exit code is 0 only if every promise was kept.
"""

import argparse
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from meshwright.configs.errors import MeshwrightError, Preempted, UserError
from meshwright.configs.loader import load_config
from meshwright.train.core.event_log import read_events
from meshwright.train.core.process_env import NUMBER, SLOT
from meshwright.train.launch.drain import drain, read_drained
from meshwright.train.report.goodput import compute_goodput
from meshwright.train.report.run_audit import Verdict, audit
from meshwright.train.report.run_record import read_record

ENDLESS = 10**9  # steps; the schedule is constant, so how long a run is changes nothing of its steps
HASTE = 0.2  # of the faults do not wait for the run to come back from the one before
LAST = 5  # steps that are left alone when the killer has gone
PATIENCE = 1200.0  # seconds a run that is left alone may take to come to its end


def main(arguments: Sequence[str]) -> None:
    """Disturb, compare, print. Raises MeshwrightError where a promise was broken, or a run did not come back."""
    parser = argparse.ArgumentParser(
        prog="meshwright bench chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="elastic/demo")
    parser.add_argument("overrides", nargs="*", default=[], help="key.sub=value ...")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the killer is at it")
    parser.add_argument(
        "--every", type=float, default=10.0, help="seconds from the return to the next fault, in the mean"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    check_comparable(options.config, options.overrides)
    job = Job(options.config, tuple(options.overrides), options.processes)
    name = f"chaos-{int(time.time())}"
    killer = Killer(job, name, random.Random(options.seed), options.every)
    killer.at_work(60 * options.minutes)
    directory, steps = Path("runs") / name, newest(Path("runs") / name) + LAST
    print(f"the killer has gone; {name} and {name}-alone run to step {steps}", flush=True)
    for one in (name, f"{name}-alone"):
        job.run_to_end(one, steps)
    verdicts = audit(directory, against=Path("runs") / f"{name}-alone")
    print(summary_table(directory, killer.faults, verdicts))
    if broken := [one.promise for one in verdicts if not one.passed]:
        raise MeshwrightError(f"{directory}: broken: {'; '.join(broken)}")


def check_comparable(config: str, overrides: Sequence[str]) -> None:
    """Raise UserError where runs of this configuration could not be compared."""
    loaded = load_config(config, overrides=overrides)
    if loaded.optimizer.schedule != "constant":
        raise UserError(
            f"optimizer.schedule: {loaded.optimizer.schedule} depends on how many steps a run has; use constant"
        )
    if not loaded.elastic.deterministic:
        raise UserError("elastic.deterministic: false lets runs differ by rounding; set it to true")


@dataclass(frozen=True)
class Job:
    """What is launched."""

    config: str
    overrides: tuple[str, ...]
    processes: int

    def launch(self, name: str, steps: int, *, engine: str = "local", **variables: str) -> subprocess.Popen:
        """`meshwright launch` of it, begun, with `variables` in its environment; its output goes to NAME.log."""
        command = [sys.executable, "-m", "meshwright.train.cli", "launch", self.config, *self.overrides]
        command += [f"name={name}", f"steps={steps}", "logging.ledger=true", "elastic.restarts=1000000"]
        command += ["elastic.strikes=0", f"--processes={self.processes}", f"--engine={engine}"]
        Path("runs").mkdir(exist_ok=True)
        with Path("runs", f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | variables)

    def run_to_end(self, name: str, steps: int) -> None:
        """Launch it and let it end by itself. Raises MeshwrightError where it does not end well."""
        launcher = self.launch(name, steps)
        try:
            code = launcher.wait(timeout=PATIENCE)
        finally:
            end_launcher(launcher)
        if code != 0:
            raise MeshwrightError(f"runs/{name}: left alone, it ended with exit code {code}; see runs/{name}.log")


@dataclass
class Killer:
    """Faults by a die, at the processes of one launcher."""

    job: Job
    name: str
    die: random.Random
    every: float
    faults: Counter[str] = field(default_factory=Counter)

    def at_work(self, seconds: float) -> None:
        """Launch the job and disturb it for so long; then have it stop."""
        launcher = self.job.launch(self.name, ENDLESS)
        end = time.monotonic() + seconds
        try:
            while True:
                if self.die.random() > HASTE:
                    wait_for_a_step(Path("runs") / self.name, launcher)
                time.sleep(self.die.uniform(0.0, 2.0) * self.every)
                if time.monotonic() > end:
                    break
                if (Path("runs") / self.name / "config.yaml").exists():
                    self.strike(launcher)
            wait_for_a_step(Path("runs") / self.name, launcher)
            launcher.terminate()
            if launcher.wait(timeout=PATIENCE) != Preempted.exit_code:
                raise MeshwrightError(f"asked to stop, the launcher ended with {launcher.returncode}, not 75")
            drain(Path("runs") / self.name, range(self.job.processes), undo=True)
        finally:
            end_launcher(launcher)

    def strike(self, launcher: subprocess.Popen) -> None:
        """One fault, whichever the die says among those that are possible."""
        trainers, directory = found(launcher, NUMBER), Path("runs") / self.name
        out, slots = read_drained(directory), found(launcher, SLOT)
        possible: dict[str, Callable[[], object]] = {}
        if trainers:
            possible["a trainer killed"] = lambda: trainers[self.die.choice(sorted(trainers))].kill()
            possible["the first trainer killed"] = trainers[0].kill
            possible["a trainer stopped"] = lambda: trainers[self.die.choice(sorted(trainers))].suspend()
        if hosts := coordinators(launcher):
            possible["the coordination service killed"] = hosts[0].kill
        if len(out) < self.job.processes - 1 and slots:
            lost = self.die.choice(sorted(slots))
            possible["a slot lost"] = lambda: (drain(directory, [lost]), slots[lost].kill())
        if out:
            possible["a slot back"] = lambda: drain(directory, [self.die.choice(sorted(out))], undo=True)
        if not possible:
            return
        # As often a slot that comes or goes as anything that happens to a process.
        slots_first = [one for one in sorted(possible) if one.startswith("a slot")]
        name = self.die.choice(slots_first if slots_first and self.die.random() < 0.5 else sorted(possible))
        with suppress(psutil.NoSuchProcess):  # it was about to end anyway
            possible[name]()
            self.faults[name] += 1
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)


def end_launcher(launcher: subprocess.Popen) -> None:
    """Have it end, and its trainers with it."""
    with suppress(subprocess.TimeoutExpired):
        launcher.terminate()
        launcher.wait(timeout=60)
    launcher.kill()


def found(launcher: subprocess.Popen, variable: str) -> dict[int, psutil.Process]:
    """The trainers of this moment, by a number in their environment."""
    trainers = {}
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher.pid).children():
            with suppress(psutil.Error, OSError):
                if variable in (told := child.environ()) and child.status() != psutil.STATUS_ZOMBIE:
                    trainers[int(told[variable])] = child
    return trainers


def coordinators(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The process that hosts JAX's coordination service, where there is one."""
    hosts = []
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher.pid).children():
            with suppress(psutil.Error, OSError):
                if "meshwright.train.launch.coordination_service" in child.cmdline():
                    hosts.append(child)
    return hosts


def wait_for_a_step(directory: Path, launcher: subprocess.Popen) -> None:
    """Until the run is seen to do steps. Raises MeshwrightError where it does not."""
    ledger, deadline = directory / "ledger" / "0.jsonl", time.monotonic() + PATIENCE
    time.sleep(2)  # a process that is killed now may have a line on its way
    before = size_of(ledger)
    while size_of(ledger) <= before + 1000:  # a few lines: not only that of the beginning
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise MeshwrightError(f"{directory}: no step after the last fault; see {directory}.log")
        time.sleep(0.2)


def size_of(file: Path) -> int:
    """Bytes of a file; 0 where it is not there yet."""
    return file.stat().st_size if file.exists() else 0


def newest(directory: Path) -> int:
    """The newest committed step."""
    return max((event["step"] for event in read_events(directory) if event["event"] == "commit"), default=0)


def summary_table(directory: Path, faults: Mapping[str, int], verdicts: Sequence[Verdict]) -> str:
    """What was done to the run, what it did about it, and which promises it kept."""
    events = read_events(directory)
    answers = Counter(event["event"] for event in events)
    levels = Counter(event["level"] for event in events if event["event"] == "restore")
    goodput = compute_goodput(read_record(directory))
    lines = ["", f"{'fault':42} {'times':>6}"]
    lines += [f"{name:42} {count:6}" for name, count in sorted(faults.items())]
    lines += [f"{'in all':42} {sum(faults.values()):6}", "", f"{'answer':42} {'times':>6}"]
    lines += [f"{name:42} {answers[name]:6}" for name in ("restart", "regroup", "shrink", "move", "grow")]
    lines += [f"{f'restored from {level}':42} {count:6}" for level, count in sorted(levels.items())]
    lines += [f"{'committed steps':42} {answers['commit']:6}", f"{'steps in all':42} {newest(directory):6}"]
    lines += [f"{'share of time that made steps that stayed':42} {100 * goodput.share:5.1f}%", "", "promise"]
    lines += [f"{one.promise:42} {'kept' if one.passed else 'BROKEN':>6}  {one.detail}" for one in verdicts]
    return "\n".join(lines)
