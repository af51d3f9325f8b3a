"""The local launcher, with workers that are a line of Python: nobody is left behind, nothing failed exits well."""

import os
import signal
import sys
import threading
import time

import pytest

from meshwright.configs.errors import MeshwrightError, Preempted, UserError
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.train.launch import local_processes
from meshwright.train.launch.job import Job
from meshwright.train.launch.launchers import launch_here

WORKER = (
    "import os, signal, sys, time; number = int(os.environ['MESHWRIGHT_PROCESS']);"
    "open(f'{sys.argv[1]}/{number}', 'w').write(str(os.getpid()));"
    "all(time.sleep(0.01) is None for _ in iter(lambda: len(os.listdir(sys.argv[1])) < 3, False));"
)


@pytest.fixture(autouse=True)
def coordination(monkeypatch):
    """No worker here speaks JAX."""
    monkeypatch.setattr(local_processes, "COORDINATOR_HOST", [sys.executable, "-c", "import time; time.sleep(600)"])


def run(directory, body, **options):
    """Three workers, started once: a failure is final."""
    command = [sys.executable, "-c", WORKER + body, str(directory)]
    launch_here(Job("run", command, 3, directory / "run", ElasticConfig(restarts=0, **options)))


def alive(directory):
    """Workers that are still there."""
    found = []
    for file in directory.iterdir():
        try:
            os.kill(int(file.read_text()), 0)
            found.append(file.name)
        except ProcessLookupError:
            pass
    return found


def ask(directory):
    """SIGTERM to this process, the supervisor's, once all workers are there."""
    while len(list(directory.iterdir())) < 3:
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


OUTCOMES = {
    "all end well": ("pass", None, None),
    "one refuses": ("sys.exit(2 if number == 1 else 0)", UserError, "process 1 refused the configuration"),
    "one fails": ("sys.exit(7 if number == 2 else 0)", MeshwrightError, r"exit codes: \{2: 7\}"),
    "one fails, two would wait": (
        "number == 0 and sys.exit(1); time.sleep(600)",
        MeshwrightError,
        r"exit codes: \{0: 1\}",
    ),
    "one is killed": ("number == 1 and os.kill(os.getpid(), 9); time.sleep(600)", MeshwrightError, "1: -9"),
}


@pytest.mark.parametrize(("body", "error", "message"), OUTCOMES.values(), ids=OUTCOMES)
def test_the_outcome_of_all(tmp_path, body, error, message):
    if error is None:
        run(tmp_path, body)
    else:
        with pytest.raises(error, match=message):
            run(tmp_path, body)
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1", "2"} and not alive(tmp_path)


def test_a_worker_deaf_to_sigterm_is_killed(tmp_path):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    threading.Thread(target=ask, args=(tmp_path,)).start()
    with pytest.raises(MeshwrightError, match=r"processes \[0, 1, 2\] did not stop when asked, within 0.5 s"):
        run(tmp_path, deaf + "time.sleep(600)", grace=0.5)
    assert not alive(tmp_path)


def test_sigterm_reaches_all_and_means_start_me_again(tmp_path):
    threading.Thread(target=ask, args=(tmp_path,)).start()
    with pytest.raises(Preempted, match="run the same command to go on"):
        run(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(600)")
    assert not alive(tmp_path)
