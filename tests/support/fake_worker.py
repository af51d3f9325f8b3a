"""A trainer without JAX: lock-step with its peers, checkpoints, an event log of its steps, and planned faults.

`faults.json` of the run directory lists {process, epoch, point, step, kind}; a worker that comes to one commits it.
"""

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from meshwright.train.core.fence import Fence
from meshwright.train.core.heartbeat import ProgressReporter
from meshwright.train.core.process_env import read_process_info
from meshwright.train.launch.straggler_detection import WAIT

STEPS, EVERY, ROWS = int(os.environ.get("WORKER_STEPS", 12)), 3, 2
DIRECTORY, PROCESS = Path(sys.argv[1]), read_process_info()
KINDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(600),
    "spin": lambda: any(iter(int, 1)),  # never ends, and lets other threads run
    "hold": lambda: ctypes.PyDLL(None).sleep(600),  # with the interpreter's lock: no thread runs
    "slow": lambda: time.sleep(0.15),
    "crash": lambda: sys.exit(1),
    "refuse": lambda: sys.exit(2),
}


def commit_faults(point, step):
    """Commit the faults that are planned for this process at this point and step."""
    for fault in json.loads((DIRECTORY / "faults.json").read_text()):
        now = {"process": PROCESS.process, "epoch": PROCESS.epoch, "point": point, "step": step}
        if all(fault[key] in (value, "any") for key, value in now.items()):
            KINDS[fault["kind"]]()


def record_event(event, **fields):
    """Write one line of this process's event log, in a single write, as the real one is written."""
    line = json.dumps({"event": event, "epoch": PROCESS.epoch, "time": time.time(), **fields}) + "\n"
    with (DIRECTORY / f"worker-{PROCESS.process}.jsonl").open("ab") as file:
        file.write(line.encode())


def wait_for_peers(step, stop_requests=()):
    """Wait for every peer of this epoch, for ever, as a collective does; false where asked to stop meanwhile."""
    arrivals = DIRECTORY / "met" / str(PROCESS.epoch) / str(step)
    arrivals.mkdir(parents=True, exist_ok=True)
    (arrivals / str(PROCESS.process)).touch()
    while len(list(arrivals.iterdir())) < PROCESS.processes:
        if stop_requests:
            return False
        time.sleep(0.005)
    return True


def save(state, step):
    """Write a draft, then give it its final name."""
    draft = DIRECTORY / "checkpoints" / f".{step}"
    draft.parent.mkdir(exist_ok=True)
    draft.write_text(json.dumps({"state": state, "step": step}))
    commit_faults("commit", step)
    draft.rename(DIRECTORY / "checkpoints" / str(step))
    record_event("commit", step=step)


def save_and_exit(state, step):
    """Save, and exit with the code that means: start me again."""
    if PROCESS.is_first and not (DIRECTORY / "checkpoints" / str(step)).exists():
        save(state, step)
    sys.exit(75)


def main():
    """Restore, step, save; exit codes are the real ones."""
    stop_requests = []
    signal.signal(signal.SIGTERM, lambda *_: stop_requests.append(True))
    fence = Fence(DIRECTORY, PROCESS.epoch)
    if PROCESS.is_first:
        fence.claim()
    progress = ProgressReporter(PROCESS, fence)
    progress.report(0, "start")
    commit_faults("start", 0)
    saved = list((DIRECTORY / "checkpoints").glob("[0-9]*"))
    newest = max(saved, key=lambda path: int(path.name), default=None)
    state, start = (json.loads(newest.read_text())[key] for key in ("state", "step")) if newest else ("seed", 0)
    record_event("restore", step=start)
    for step in range(start + 1, STEPS + 1):
        progress.set_activity("work")
        commit_faults("step", step)
        progress.report(step - 1)  # a trainer has sent its step off when it reads the metrics of the one before
        progress.set_activity(WAIT)
        if not wait_for_peers(step, stop_requests):
            save_and_exit(state, step - 1)
        fence.check()
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        row = (step * PROCESS.processes + PROCESS.process) * ROWS
        record_event("applied", step=step, samples=list(range(row, row + ROWS)))
        time.sleep(0.03)
        if PROCESS.is_first and step % EVERY == 0:
            commit_faults("save", step)
            save(state, step)
        if stop_requests:
            save_and_exit(state, step)
    wait_for_peers("end")
    commit_faults("end", STEPS)
    record_event("finish", state=state)


if __name__ == "__main__":
    main()
