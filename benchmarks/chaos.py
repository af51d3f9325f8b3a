"""`meshwright bench chaos`: random faults in a run for some minutes, then an audit of it against an undisturbed run.

    meshwright bench chaos --minutes 10

Every few seconds one of these faults happens, chosen by a seeded random generator: a trainer is killed (SIGKILL), or
the first trainer, or the coordination service; a trainer is stopped (SIGSTOP); a slot is lost with its trainer, or
comes back. After that the run is asked to stop, and continues without faults for its last steps. Then the same
configuration runs undisturbed to the same step, and `audit` compares: parameters and optimizer bit for bit, the
samples, and the rules of the event logs. The exit code is 0 only if every promise was kept.
"""

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

from meshwright.benchmarks.harness import bench_parser
from meshwright.configs.errors import MeshwrightError, Preemption, UserError
from meshwright.configs.loader import load_config
from meshwright.train.core.event_log import read_events
from meshwright.train.core.process_env import NUMBER, SLOT
from meshwright.train.launch.drain import drain, read_drained
from meshwright.train.report.goodput import compute_goodput
from meshwright.train.report.run_audit import Verdict, audit
from meshwright.train.report.run_record import read_record

ENDLESS = 10**9  # steps; with a constant schedule the length of a run does not change its steps
EARLY_SHARE = 0.2  # of the faults happen before the run has recovered from the one before
LAST_STEPS = 5  # steps without faults at the end
TIMEOUT = 1200.0  # seconds for a run to do a step or to end


def main(arguments: Sequence[str]) -> None:
    """Inject faults, compare, print. Raises MeshwrightError if a promise was broken, or if a run did not recover."""
    parser = bench_parser("chaos", __doc__)
    parser.add_argument("config", nargs="?", default="elastic/demo")
    parser.add_argument("overrides", nargs="*", default=[], help="key.sub=value ...")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes with faults")
    parser.add_argument("--every", type=float, default=10.0, help="mean seconds from recovery to the next fault")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    check_comparable(options.config, options.overrides)
    job = Job(options.config, tuple(options.overrides), options.processes)
    name = f"chaos-{int(time.time())}"
    injector = FaultInjector(job, name, random.Random(options.seed), options.every)
    injector.run(60 * options.minutes)
    steps = newest_commit(Path("runs") / name) + LAST_STEPS
    print(f"no more faults; {name} and {name}-alone run to step {steps}", flush=True)
    for run in (name, f"{name}-alone"):
        job.run_to_end(run, steps)
    compare_runs(name, injector.faults)


def compare_runs(name: str, faults: Mapping[str, int]) -> None:
    """Audit runs/NAME against runs/NAME-alone and print. Raises MeshwrightError if a promise was broken."""
    directory = Path("runs") / name
    verdicts = audit(directory, against=Path("runs") / f"{name}-alone")
    print(summary_table(directory, faults, verdicts))
    if broken := [verdict.promise for verdict in verdicts if not verdict.passed]:
        raise MeshwrightError(f"{directory}: broken: {'; '.join(broken)}")


def check_comparable(config: str, overrides: Sequence[str]) -> None:
    """Raise UserError if two runs of this configuration cannot be compared."""
    loaded = load_config(config, overrides=overrides)
    if loaded.optimizer.schedule != "constant":
        schedule = loaded.optimizer.schedule
        raise UserError(f"optimizer.schedule: {schedule} depends on the number of steps of a run; use constant")
    if not loaded.elastic.deterministic:
        raise UserError("elastic.deterministic: false lets runs differ by rounding; set it to true")


@dataclass(frozen=True)
class Job:
    """A configuration to launch."""

    config: str
    overrides: tuple[str, ...]
    processes: int

    def launch(self, name: str, steps: int, *, engine: str = "local", **variables: str) -> subprocess.Popen:
        """Start `meshwright launch` with `variables` in its environment; its output goes to NAME.log."""
        command = [sys.executable, "-m", "meshwright.train.cli", "launch", self.config, *self.overrides]
        command += [f"name={name}", f"steps={steps}", "logging.ledger=true", "elastic.restarts=1000000"]
        command += ["elastic.strikes=0", f"--processes={self.processes}", f"--engine={engine}"]
        Path("runs").mkdir(exist_ok=True)
        with Path("runs", f"{name}.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | variables)

    def run_to_end(self, name: str, steps: int) -> None:
        """Launch it and wait for its end. Raises MeshwrightError if it fails."""
        launcher = self.launch(name, steps)
        try:
            code = launcher.wait(timeout=TIMEOUT)
        finally:
            end_launcher(launcher)
        if code != 0:
            raise MeshwrightError(f"runs/{name}: without faults, it ended with exit code {code}; see runs/{name}.log")


@dataclass
class FaultInjector:
    """Injects random faults into the processes of one launcher; counts them in `faults`."""

    job: Job
    name: str
    generator: random.Random
    interval: float  # mean seconds
    faults: Counter[str] = field(default_factory=Counter)

    def run(self, seconds: float) -> None:
        """Launch the job, inject faults for so long, then stop it."""
        launcher = self.job.launch(self.name, ENDLESS)
        end = time.monotonic() + seconds
        try:
            while True:
                if self.generator.random() > EARLY_SHARE:
                    wait_for_a_step(Path("runs") / self.name, launcher)
                time.sleep(self.generator.uniform(0.0, 2.0) * self.interval)
                if time.monotonic() > end:
                    break
                if (Path("runs") / self.name / "config.yaml").exists():
                    self.inject(launcher)
            wait_for_a_step(Path("runs") / self.name, launcher)
            launcher.terminate()
            if launcher.wait(timeout=TIMEOUT) != Preemption.exit_code:
                raise MeshwrightError(f"asked to stop, the launcher ended with {launcher.returncode}, not 75")
            drain(Path("runs") / self.name, range(self.job.processes), undo=True)
        finally:
            end_launcher(launcher)

    def inject(self, launcher: subprocess.Popen) -> None:
        """Inject one of the faults that are possible now."""
        trainers, directory = numbered_processes(launcher, NUMBER), Path("runs") / self.name
        drained, slots = read_drained(directory), numbered_processes(launcher, SLOT)
        possible: dict[str, Callable[[], object]] = {}
        if trainers:
            possible["a trainer killed"] = lambda: trainers[self.generator.choice(sorted(trainers))].kill()
            possible["the first trainer killed"] = trainers[0].kill
            possible["a trainer stopped"] = lambda: trainers[self.generator.choice(sorted(trainers))].suspend()
        if services := module_processes(launcher, "meshwright.train.launch.coordination_service"):
            possible["the coordination service killed"] = services[0].kill
        if len(drained) < self.job.processes - 1 and slots:
            slot = self.generator.choice(sorted(slots))
            possible["a slot lost"] = lambda: (drain(directory, [slot]), slots[slot].kill())
        if drained:
            possible["a slot back"] = lambda: drain(directory, [self.generator.choice(sorted(drained))], undo=True)
        if not possible:
            return
        # Faults of slots are as frequent as all others together.
        slot_faults = [name for name in sorted(possible) if name.startswith("a slot")]
        name = self.generator.choice(slot_faults if slot_faults and self.generator.random() < 0.5 else sorted(possible))
        with suppress(psutil.NoSuchProcess):  # the process has ended meanwhile
            possible[name]()
            self.faults[name] += 1
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)


def end_launcher(launcher: subprocess.Popen) -> None:
    """Stop the launcher and its trainers."""
    with suppress(subprocess.TimeoutExpired):
        launcher.terminate()
        launcher.wait(timeout=60)
    launcher.kill()


def numbered_processes(launcher: subprocess.Popen, variable: str) -> dict[int, psutil.Process]:
    """The running trainers, by the number in an environment variable."""
    trainers = {}
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(launcher.pid).children():
            with suppress(psutil.Error, OSError):
                if variable in (values := child.environ()) and child.status() != psutil.STATUS_ZOMBIE:
                    trainers[int(values[variable])] = child
    return trainers


def module_processes(launcher: subprocess.Popen, module: str) -> list[psutil.Process]:
    """The launcher's children that run `module`; [] if a child ends meanwhile."""
    with suppress(psutil.Error, OSError):
        return [child for child in psutil.Process(launcher.pid).children() if module in child.cmdline()]
    return []


def wait_for_a_step(directory: Path, launcher: subprocess.Popen) -> None:
    """Wait until the run does steps. Raises MeshwrightError if it does not within `TIMEOUT`."""
    sample_log, deadline = directory / "ledger" / "0.jsonl", time.monotonic() + TIMEOUT
    size = lambda: sample_log.stat().st_size if sample_log.exists() else 0
    time.sleep(2)  # a process that was just killed may still write a line
    start = size()
    while size() <= start + 1000:  # a few lines, more than those of a start
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise MeshwrightError(f"{directory}: no step after the last fault; see {directory}.log")
        time.sleep(0.2)


def newest_commit(directory: Path) -> int:
    """The newest committed step; 0 if there is none."""
    return max((event["step"] for event in read_events(directory) if event["event"] == "commit"), default=0)


def summary_table(directory: Path, faults: Mapping[str, int], verdicts: Sequence[Verdict]) -> str:
    """The faults of a run, its reactions, and the promises that it kept."""
    events = read_events(directory)
    counts = Counter(event["event"] for event in events)
    levels = Counter(event["level"] for event in events if event["event"] == "restore")
    goodput = compute_goodput(read_record(directory))
    lines = ["", f"{'fault':42} {'times':>6}"]
    lines += [f"{name:42} {count:6}" for name, count in sorted(faults.items())]
    lines += [f"{'in all':42} {sum(faults.values()):6}", "", f"{'answer':42} {'times':>6}"]
    lines += [f"{name:42} {counts[name]:6}" for name in ("restart", "regroup", "shrink", "move", "grow")]
    lines += [f"{f'restored from {level}':42} {count:6}" for level, count in sorted(levels.items())]
    lines += [f"{'committed steps':42} {counts['commit']:6}", f"{'steps in all':42} {newest_commit(directory):6}"]
    lines += [f"{'share of time for steps that were not lost':42} {100 * goodput.share:5.1f}%", "", "promise"]
    lines += [f"{v.promise:42} {'kept' if v.passed else 'BROKEN':>6}  {v.detail}" for v in verdicts]
    return "\n".join(lines)
