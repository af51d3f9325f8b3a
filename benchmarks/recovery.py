"""`meshwright bench recovery`: the time from the kill of a trainer to the next new step, by level and by part.

It starts a small run in several processes three times and reads the times from the run's event log:

    storage     a trainer is killed with SIGKILL; checkpoints are in storage only
    memory      the same, with a snapshot in memory at every step
    parity      a host is lost: its trainer, its snapshot agent and its memory; every process is a host, with XOR parity

    meshwright bench recovery --processes 2
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meshwright.benchmarks.chaos import module_processes, numbered_processes
from meshwright.benchmarks.harness import bench_parser
from meshwright.checkpoint.redundancy.agent_files import memory_directory
from meshwright.train.core.event_log import read_events, read_metrics
from meshwright.train.core.process_env import NUMBER

AGENT = "meshwright.train.launch.snapshot_agent_main"
EVERY = 20  # steps between checkpoints
LEVELS = {
    "storage": "memory_every: 0",
    "memory": "memory_every: 1",
    "parity": "memory_every: 1, parity: xor",
}  # of the section checkpoint
SMALL = (
    "steps=120", "logging={every: 1, tensorboard: false}", "model.layers=2", "model.embed=128", "model.heads=4",
    "model.kv_heads=2", "model.mlp=256", "model.vocab=384", "data.source=synthetic",
    "data.tokenizer={bytes: true, train: null, vocab: null}", "data.held_out=0", "data.sequence_length=128",
    "data.global_batch=8", "evaluation.prompts=[]", "optimizer.warmup_steps=0", "mesh.fsdp=1", "mesh.tensor=1",
    "elastic.backoff=0",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Measure and print JSON."""
    parser = bench_parser("recovery", __doc__)
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        measure(Path(root), "storage", options.processes)  # fills the compilation cache
        print(json.dumps({level: measure(Path(root), level, options.processes) for level in LEVELS}, indent=1))


def measure(root: Path, level: str, processes: int) -> dict[str, Any]:
    """Start a run, kill a trainer, and return the seconds of its recovery."""
    name = f"{level}-{time.time_ns()}"
    command = [sys.executable, "-m", "meshwright.train.cli", "launch", "quickstart", *SMALL, f"name={name}",
               f"mesh.data={processes}", f"mesh.devices={processes}", f"--processes={processes}",
               f"launch.hosts={processes if level == 'parity' else 1}",
               f"checkpoint={{every: {EVERY}, keep: 3, {LEVELS[level]}}}"]  # fmt: skip
    launcher = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    directory = root / "runs" / name
    events = lambda kind: [event for event in read_events(directory) if event["event"] == kind]
    last_step = lambda: max((row["step"] for row in read_metrics(directory)), default=0)
    try:
        wait(launcher, lambda: events("commit"))
        steps = last_step() + EVERY // 2
        wait(launcher, lambda: last_step() >= steps)
        host, trainer = max(numbered_processes(launcher, NUMBER).items())
        victims = [trainer]
        if level == "parity":
            agents = module_processes(launcher, AGENT)
            victims.append(next(agent for agent in agents if json.loads(agent.cmdline()[-1])["host"] == host))
        killed = time.time()
        for process in victims:
            process.kill()
        if level == "parity":
            shutil.rmtree(memory_directory(directory, host=host))
        wait(launcher, lambda: len(events("compile")) == 2)
        wait(launcher, lambda: last_step() > events("restart")[0]["step"])
        total = time.time() - killed
    finally:
        launcher.terminate()
        launcher.wait()
    restart, restore, compiled = events("restart")[0], events("restore")[0], events("compile")[1]
    parts = {
        "detect": restart["time"] - killed,
        "start": restore["time"] - restart["time"] - restore["restore_seconds"] - restore.get("rebuild_seconds", 0.0),
        "verify and rebuild": restore.get("rebuild_seconds", 0.0),
        "restore": restore["restore_seconds"],
        "compile": compiled["seconds"],
    }
    return {
        "seconds": round(total, 2),
        **{name: round(seconds, 2) for name, seconds in parts.items()},
        "plan and first steps": round(total - sum(parts.values()), 2),
        "steps lost": restart["step"] - restore["step"],
        "level": restore["level"],
    }


def wait(launcher: subprocess.Popen, condition: Callable[[], object]) -> None:
    """Wait until `condition()` is true. Raises RuntimeError if the run ends before, or after 10 minutes."""
    deadline = time.monotonic() + 600
    while not condition():
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run ended with exit code {launcher.poll()} before it could be measured")
        time.sleep(0.2)
