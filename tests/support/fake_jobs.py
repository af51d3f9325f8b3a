"""Jobs of fake workers (`fake_worker.py`): the faults they commit, and what their event logs say afterwards."""

import hashlib
import json
import sys
import threading
from pathlib import Path

from support.waiting import wait_until

from meshwright.train.core.event_log import read_events

WORKER = [sys.executable, str(Path(__file__).parent / "fake_worker.py")]


def make_run(directory, *faults):
    """A run directory whose workers commit `faults`: (process, epoch, point, step, kind) each."""
    keys = ("process", "epoch", "point", "step", "kind")
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text("{}")
    (directory / "faults.json").write_text(json.dumps([dict(zip(keys, fault, strict=True)) for fault in faults]))
    return directory


def when(condition, act):
    """Call `act` in a thread, once `condition` holds."""

    threading.Thread(target=lambda: (wait_until(condition), act()), daemon=True).start()


def worker_event_log(directory, index):
    return [json.loads(line) for line in (directory / f"worker-{index}.jsonl").read_text().splitlines()]


def last_states(directory, processes):
    """The state that each worker last wrote; None where its last event is not that it finished."""
    return {worker_event_log(directory, index)[-1].get("state") for index in range(processes)}


def final_state(steps=12):
    """The state of a worker after `steps` steps that nothing disturbed."""
    state = "seed"
    for step in range(1, steps + 1):
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
    return state


def restarts(directory):
    return [event for event in read_events(directory) if event["event"] == "restart"]
