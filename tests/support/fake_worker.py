"""A trainer without JAX: lock-step with its peers, checkpoints, a journal of what it applied, and faults on demand.

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
DIRECTORY, PLACE = Path(sys.argv[1]), read_process_info()
KINDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(600),
    "spin": lambda: any(iter(int, 1)),  # never ends, and lets other threads run
    "hold": lambda: ctypes.PyDLL(None).sleep(600),  # with the interpreter's lock: no thread says a word
    "slow": lambda: time.sleep(0.15),
    "crash": lambda: sys.exit(1),
    "refuse": lambda: sys.exit(2),
}


def fault(point, step):
    """Commit the fault that is planned for here and now."""
    for planned in json.loads((DIRECTORY / "faults.json").read_text()):
        here = {"process": PLACE.process, "epoch": PLACE.epoch, "point": point, "step": step}
        if all(planned[key] in (value, "any") for key, value in here.items()):
            KINDS[planned["kind"]]()


def tell(event, **fields):
    """One line of this process's journal; a single write, as the real one."""
    line = json.dumps({"event": event, "epoch": PLACE.epoch, "time": time.time(), **fields}) + "\n"
    with (DIRECTORY / f"worker-{PLACE.process}.jsonl").open("ab") as file:
        file.write(line.encode())


def meet(step, asked=()):
    """Wait for every peer of this epoch, for ever, as a collective does; false where asked to stop meanwhile."""
    place = DIRECTORY / "met" / str(PLACE.epoch) / str(step)
    place.mkdir(parents=True, exist_ok=True)
    (place / str(PLACE.process)).touch()
    while len(list(place.iterdir())) < PLACE.processes:
        if asked:
            return False
        time.sleep(0.005)
    return True


def save(state, step):
    """A draft, then its final name."""
    draft = DIRECTORY / "checkpoints" / f".{step}"
    draft.parent.mkdir(exist_ok=True)
    draft.write_text(json.dumps({"state": state, "step": step}))
    fault("commit", step)
    draft.rename(DIRECTORY / "checkpoints" / str(step))
    tell("commit", step=step)


def leave(state, step):
    """Save and say: start me again."""
    if PLACE.is_first and not (DIRECTORY / "checkpoints" / str(step)).exists():
        save(state, step)
    sys.exit(75)


def main():
    """Restore, step, save; exit codes are the real ones."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    fence = Fence(DIRECTORY, PLACE.epoch)
    if PLACE.is_first:
        fence.claim()
    progress = ProgressReporter(PLACE, fence)
    progress.report(0, "start")
    fault("start", 0)
    saved = list((DIRECTORY / "checkpoints").glob("[0-9]*"))
    newest = max(saved, key=lambda path: int(path.name), default=None)
    state, start = (json.loads(newest.read_text())[key] for key in ("state", "step")) if newest else ("seed", 0)
    tell("restore", step=start)
    for step in range(start + 1, STEPS + 1):
        progress.set_activity("work")
        fault("step", step)
        progress.report(step - 1)  # a trainer has sent its step off when it reads the metrics of the one before
        progress.set_activity(WAIT)
        if not meet(step, asked):
            leave(state, step - 1)
        fence.check()
        state = hashlib.sha256(f"{state} {step}".encode()).hexdigest()
        row = (step * PLACE.processes + PLACE.process) * ROWS
        tell("applied", step=step, samples=list(range(row, row + ROWS)))
        time.sleep(0.03)
        if PLACE.is_first and step % EVERY == 0:
            fault("save", step)
            save(state, step)
        if asked:
            leave(state, step)
    meet("end")
    fault("end", STEPS)
    tell("finish", state=state)


if __name__ == "__main__":
    main()
