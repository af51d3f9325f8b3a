"""The local launcher, with workers that are a line of Python: nobody is left behind, nothing failed exits well."""

import os
import signal
import sys
import threading

import pytest
from support.waiting import wait_until

from meshwright.configs.errors import MeshwrightError, Preemption, UserError
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.train.launch.job import Job
from meshwright.train.launch.launchers import launch_local

pytestmark = pytest.mark.usefixtures("idle_coordination_service")
WORKER = (
    "import os, signal, sys, time; number = int(os.environ['MESHWRIGHT_PROCESS']);"
    "here = lambda: open(f'{sys.argv[1]}/{number}', 'w').write(str(os.getpid()));"
    "met = lambda: all(time.sleep(0.01) is None for _ in iter(lambda: len(os.listdir(sys.argv[1])) < 3, False));"
)
HERE = "here(); met();"


def run(directory, body, *, before="", **options):
    """Three workers, started once: a failure is final. They do `before`, wait for each other, then `body`."""
    command = [sys.executable, "-c", WORKER + before + HERE + body, str(directory)]
    launch_local(Job("run", command, 3, directory / "run", ElasticConfig(restarts=0, **options)))


def alive(directory):
    """Names of the workers that are still there."""
    names = []
    for file in directory.iterdir():
        try:
            os.kill(int(file.read_text()), 0)
            names.append(file.name)
        except ProcessLookupError:
            pass
    return names


def stop_when_started(directory):
    """Send SIGTERM to this process, the supervisor's, once all workers are there."""
    wait_until(lambda: len(list(directory.iterdir())) == 3)
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
def test_exit_codes_decide_the_outcome_and_no_worker_is_left(tmp_path, body, error, message):
    if error is None:
        run(tmp_path, body)
    else:
        with pytest.raises(error, match=message):
            run(tmp_path, body)
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1", "2"} and not alive(tmp_path)


def test_a_worker_that_ignores_sigterm_is_killed(tmp_path):
    threading.Thread(target=stop_when_started, args=(tmp_path,)).start()
    with pytest.raises(MeshwrightError, match=r"processes \[0, 1, 2\] did not stop when asked, within 0.5 s"):
        run(tmp_path, "time.sleep(600)", before="signal.signal(signal.SIGTERM, signal.SIG_IGN);", grace=0.5)
    assert not alive(tmp_path)


def test_sigterm_stops_all_workers_and_is_a_preemption(tmp_path):
    threading.Thread(target=stop_when_started, args=(tmp_path,)).start()
    with pytest.raises(Preemption, match="run the same command to go on"):
        run(tmp_path, "time.sleep(600)", before="signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));")
    assert not alive(tmp_path)
