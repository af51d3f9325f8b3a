"""`meshwright launch` as a process of its own, and what the run leaves behind."""

import json
import os
import subprocess
import sys

import psutil

from meshwright.checkpoint import manifest
from meshwright.train.core.event_log import read_events


def start_launch(directory, *arguments, processes=2, stderr=subprocess.PIPE, **variables):
    """Start `meshwright launch quickstart` in `directory`, with one simulated device a process."""
    directory.mkdir(exist_ok=True)
    environment = os.environ | {"MESHWRIGHT_CACHE": str(directory.parent / "cache"), "XLA_FLAGS": ""} | variables
    command = [sys.executable, "-m", "meshwright.train.cli", "launch", "quickstart", *arguments]
    command += ["--processes", str(processes), "--devices-per-process", "1"]
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)


def finish_launch(launcher):
    """Wait for a launcher that ends well."""
    errors = launcher.communicate(timeout=600)[1].decode()
    assert launcher.returncode == 0, errors[-3000:]


def final_parameters(run):
    """Fingerprints of the arrays of the newest checkpoint, by canonical name."""
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    return {name: array.blocks for name, array in manifest.read(newest).arrays.items()}


def events_of(run, *kinds):
    """The events of these kinds in a run's event log; none where there is no run yet."""
    return [event for event in read_events(run) if event["event"] in kinds] if run.exists() else []


def child_processes(launcher):
    """(process ids of the trainers by number, of the snapshot agents by host)."""
    trainers, agents = {}, {}
    for child in psutil.Process(launcher.pid).children():
        arguments, environment = child.cmdline(), child.environ()
        if "meshwright.train.launch.snapshot_agent_main" in arguments:
            agents[json.loads(arguments[-1])["host"]] = child.pid
        elif "MESHWRIGHT_PROCESS" in environment:
            trainers[int(environment["MESHWRIGHT_PROCESS"])] = child.pid
    return trainers, agents
