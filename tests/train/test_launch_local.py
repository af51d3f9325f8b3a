"""The local launcher, with workers that are a line of Python: nobody is left behind, nothing failed exits well."""

import os
import signal
import sys
import threading
import time

import pytest

from meshwright.configs.errors import MeshwrightError, Preempted, UserError
from meshwright.train.launch.local import launch

WORKER = (
    "import os, signal, sys, time; number = int(os.environ['MESHWRIGHT_PROCESS']);"
    "open(f'{sys.argv[1]}/{number}', 'w').write(str(os.getpid()));"
)


def run(directory, body, **options):
    launch([sys.executable, "-c", WORKER + body, str(directory)], processes=3, **options)


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


OUTCOMES = {
    "all end well": ("pass", None, None),
    "one refuses": ("sys.exit(2 if number == 1 else 0)", UserError, "process 1 refused the configuration"),
    "one fails": ("sys.exit(7 if number == 2 else 0)", MeshwrightError, r"exit codes: \{2: 7\}"),
    "one fails, two would wait": ("number == 0 and sys.exit(1); time.sleep(600)", MeshwrightError, r"0: 1.*1: -15"),
    "one is killed": ("number == 1 and os.kill(os.getpid(), 9); time.sleep(600)", MeshwrightError, "1: -9"),
}


@pytest.mark.parametrize(("body", "error", "message"), OUTCOMES.values(), ids=OUTCOMES)
def test_the_outcome_of_all(tmp_path, body, error, message):
    if error is None:
        run(tmp_path, body)
    else:
        with pytest.raises(error, match=message):
            run(tmp_path, body, grace=5)
    assert {file.name for file in tmp_path.iterdir()} == {"0", "1", "2"} and not alive(tmp_path)


def test_a_worker_deaf_to_sigterm_is_killed(tmp_path):
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    body = deaf + "number == 0 and (time.sleep(1), sys.exit(1)); time.sleep(600)"
    with pytest.raises(MeshwrightError, match="1: -9"):
        run(tmp_path, body, grace=0.5)
    assert not alive(tmp_path)


def test_sigterm_reaches_all_and_means_start_me_again(tmp_path):
    def ask():
        while len(list(tmp_path.iterdir())) < 3:
            time.sleep(0.02)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    with pytest.raises(Preempted, match="run the same command to go on"):
        run(tmp_path, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(600)")
    assert not alive(tmp_path)
