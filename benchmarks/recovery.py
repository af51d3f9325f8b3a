"""`meshwright bench recovery`: from the kill of a trainer to the next step that is new, by level and by part.

Starts a small run in several processes three times and reads where the time went from the run's journal:

    storage     a trainer is killed with SIGKILL; checkpoints in storage only
    memory      the same, with a snapshot in memory at every step
    parity      a host is lost: its trainer, its keeper and its memory; every process is a host, with XOR parity

    meshwright bench recovery --processes 2
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from meshwright.checkpoint.redundancy.agent_files import memory_directory
from meshwright.train.core.event_log import read_events
from meshwright.train.core.process_env import NUMBER

KEEPER = "meshwright.train.launch.snapshot_agent_main"
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
    parser = argparse.ArgumentParser(
        prog="meshwright bench recovery", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=4)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        warm = measured(Path(root), "storage", options.processes)  # fills the compilation cache
        del warm
        print(json.dumps({name: measured(Path(root), name, options.processes) for name in LEVELS}, indent=1))


def measured(root: Path, level: str, processes: int) -> dict[str, Any]:
    """One run with one kill."""
    name = f"{level}-{time.time_ns()}"
    command = [sys.executable, "-m", "meshwright.train.cli", "launch", "quickstart", *SMALL, f"name={name}",
               f"mesh.data={processes}", f"mesh.devices={processes}", f"--processes={processes}",
               f"launch.hosts={processes if level == 'parity' else 1}",
               f"checkpoint={{every: {EVERY}, keep: 3, {LEVELS[level]}}}"]  # fmt: skip
    launcher = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    directory = root / "runs" / name
    try:
        wait(launcher, lambda: any(event["event"] == "commit" for event in events(directory)))
        steps = rows(directory)[-1]["step"] + EVERY // 2
        wait(launcher, lambda: rows(directory)[-1]["step"] >= steps)
        victim, process = max(trainers(launcher).items())
        keeper = keeper_of(launcher, victim) if level == "parity" else None
        killed = time.time()
        os.kill(process, signal.SIGKILL)
        if keeper is not None:
            os.kill(keeper, signal.SIGKILL)
            shutil.rmtree(memory_directory(directory, host=victim))
        wait(launcher, lambda: len([e for e in events(directory) if e["event"] == "compile"]) == 2)
        reached = next(event["step"] for event in events(directory) if event["event"] == "restart")
        wait(launcher, lambda: any(row["step"] > reached for row in rows(directory)))
        total = time.time() - killed
    finally:
        launcher.terminate()
        launcher.wait()
    return split(events(directory), killed, total)


def split(found: list[dict[str, Any]], killed: float, total: float) -> dict[str, Any]:
    """Seconds by part, from the journal."""
    restart = next(event for event in found if event["event"] == "restart")
    restore = next(event for event in found if event["event"] == "restore")
    compiled = [event for event in found if event["event"] == "compile"][1]
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


def trainers(launcher: subprocess.Popen) -> dict[int, int]:
    """Process number -> process id."""
    children = [(child.pid, child.environ()) for child in psutil.Process(launcher.pid).children()]
    return {int(told[NUMBER]): pid for pid, told in children if NUMBER in told}


def keeper_of(launcher: subprocess.Popen, host: int) -> int:
    """Process id of a host's keeper."""
    children = [(child.pid, child.cmdline()) for child in psutil.Process(launcher.pid).children()]
    return next(pid for pid, words in children if KEEPER in words and json.loads(words[-1])["host"] == host)


def events(directory: Path) -> list[dict[str, Any]]:
    """The journal so far."""
    return read_events(directory) if directory.exists() else []


def rows(directory: Path) -> list[dict[str, Any]]:
    """The metrics so far, after a row for step 0."""
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [{"step": 0}, *(json.loads(line) for line in lines if line.endswith("}"))]


def wait(launcher: subprocess.Popen, happened: Any) -> None:
    """Until `happened()`; an error where the run ends before."""
    deadline = time.monotonic() + 600
    while not happened():
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run ended with exit code {launcher.poll()} before it could be measured")
        time.sleep(0.2)
