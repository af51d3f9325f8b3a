"""Processes that die, stop, sleep or flap, under the real supervisor: checked afterwards from their event logs."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.fake_jobs import WORKER, final_state, make_run, restarts, when, worker_event_log
from support.waiting import wait_until

from meshwright.configs.errors import MeshwrightError, Preemption, UserError
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.train.core.event_log import read_events
from meshwright.train.core.rendezvous import Server
from meshwright.train.launch import local_processes
from meshwright.train.launch.job import Job
from meshwright.train.launch.launchers import launch_local
from meshwright.train.launch.local_processes import LocalEngine
from meshwright.train.launch.supervisor import Supervisor

PROCESSES, STEPS, ROWS = 3, 12, 2
SETTINGS = {"backoff": 0.01, "hang_factor": 2.0, "hang_floor": 4.0, "start_timeout": 20.0, "grace": 10.0}
pytestmark = pytest.mark.usefixtures("idle_coordination_service")


def job(directory, *faults, **settings):
    command = [*WORKER, str(make_run(directory, *faults))]
    return Job("run", command, PROCESSES, directory, ElasticConfig(**{**SETTINGS, **settings}))


def run(directory, *faults, **settings):
    launch_local(job(directory, *faults, **settings))


def surviving_steps(events):
    """Step -> samples, of the steps that no restore undid."""
    timeline = {}
    for event in events:
        if event["event"] == "restore":
            timeline = {step: rows for step, rows in timeline.items() if step <= event["step"]}
        elif event["event"] == "applied":
            assert event["step"] == max(timeline, default=0) + 1, "a step was left out, or applied twice"
            timeline[event["step"]] = event["samples"]
    return timeline


def check(directory):
    """No committed step lost, none applied twice, every sample once, and the state is the undisturbed run's."""
    logs = [worker_event_log(directory, index) for index in range(PROCESSES)]
    committed = 0
    for event in sorted((event for events in logs for event in events), key=lambda event: event["time"]):
        if event["event"] == "commit":
            assert event["step"] > committed, "a step was committed twice"
            committed = event["step"]
        elif event["event"] == "restore":
            # A commit whose line in the event log was lost with its process is on disk all the same.
            assert event["step"] >= committed, "a committed step was lost"
            committed = event["step"]
    samples = sorted(sample for events in logs for rows in surviving_steps(events).values() for sample in rows)
    first = PROCESSES * ROWS
    assert samples == list(range(first, first + STEPS * first))
    assert {event["state"] for events in logs for event in events if event["event"] == "finish"} == {final_state(STEPS)}


# Faults, and (suspect, a part of the reason) of each restart.
FAULTS = {
    "nothing": ([], []),
    "the first is killed": ([(0, 1, "step", 5, "kill")], [(0, "-9")]),
    "another is killed": ([(2, 1, "step", 5, "kill")], [(2, "-9")]),
    "two at once": ([(0, 1, "step", 5, "kill"), (2, 1, "step", 5, "kill")], [(None, "-9")]),
    "killed before a save": ([(0, 1, "save", 6, "kill")], [(0, "-9")]),
    "killed between draft and commit": ([(0, 1, "commit", 6, "kill")], [(0, "-9")]),
    "stopped": ([(1, 1, "step", 5, "stop")], [(1, "process 1 hangs, at step")]),
    "asleep": ([(2, 1, "step", 8, "sleep")], [(2, "process 2 hangs, at step 6")]),
    "an endless loop": ([(2, 1, "step", 8, "spin")], [(2, "process 2 hangs, at step")]),
    "the interpreter's lock held": ([(1, 1, "step", 5, "hold")], [(1, "process 1 hangs, at step")]),
    "crash at start": ([(1, 1, "start", 0, "crash")], [(1, "{1: 1}")]),
    "failure during recovery": ([(1, 1, "step", 5, "kill"), (0, 2, "start", 0, "kill")], [(1, "-9"), (0, "-9")]),
    "killed at the end": ([(1, 1, "end", 12, "kill")], [(1, "-9")]),
}


@pytest.mark.parametrize(("faults", "expected"), FAULTS.values(), ids=FAULTS)
def test_a_run_with_faults_ends_as_one_without(tmp_path, faults, expected):
    run(tmp_path, *faults)
    check(tmp_path)
    for event, (suspect, reason) in zip(restarts(tmp_path), expected, strict=True):
        assert suspect in (None, event["suspect"]) and reason in event["reason"]


COORDINATORS = {
    "its port is taken": ("sys.exit(1)", "exit code 1"),
    "it dies": ("time.sleep(1); os.kill(os.getpid(), 9)", "exit code -9"),
}


@pytest.mark.parametrize(("statement", "exit_code"), COORDINATORS.values(), ids=COORDINATORS)
def test_a_lost_coordination_service_restarts_the_run(tmp_path, monkeypatch, statement, exit_code):
    code = f"import os, pathlib, sys, time; first = pathlib.Path({str(tmp_path)!r}, 'first')\n"
    code += f"if not first.exists(): first.touch(); {statement}\ntime.sleep(600)"
    monkeypatch.setattr(local_processes, "COORDINATION_SERVICE", [sys.executable, "-c", code])
    run(tmp_path, (1, 1, "step", 5, "sleep"))
    check(tmp_path)
    (restart,) = restarts(tmp_path)
    assert "coordination service" in restart["reason"] and restart["reason"].endswith(exit_code)


def test_the_launcher_gives_up_on_a_process_that_always_dies(tmp_path):
    with pytest.raises(MeshwrightError, match=r"exit codes: \{1: -9\}; gave up after 3 failures \(elastic.restarts\)"):
        run(tmp_path, (1, "any", "step", 5, "kill"), restarts=2)
    assert [event["event"] for event in read_events(tmp_path)] == ["restart", "restart", "give-up"]
    assert json.loads((tmp_path / "checkpoints" / "3").read_text())["step"] == 3


def test_a_refused_configuration_is_not_restarted(tmp_path):
    with pytest.raises(UserError, match="process 2 refused the configuration"):
        run(tmp_path, (2, 1, "start", 0, "refuse"))
    assert not read_events(tmp_path)


def test_sigterm_saves_and_the_next_launch_goes_on(tmp_path):
    def stop():
        for _ in range(2):  # some schedulers send it twice
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    when((tmp_path / "met" / "1" / "5").exists, stop)
    with pytest.raises(Preemption):
        run(tmp_path)
    steps = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(steps) >= 4
    run(tmp_path)
    check(tmp_path)


def test_a_jump_of_the_clock_is_no_failure(tmp_path, monkeypatch):
    """An hour forth, two back, at every look: what is late is told by a clock that only goes forward."""
    real, looks = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + (3600, -7200)[next(looks) % 2])
    run(tmp_path, (1, 1, "step", 5, "kill"))
    check(tmp_path)
    assert len(restarts(tmp_path)) == 1


def test_a_stopped_process_of_an_old_epoch_writes_nothing_once_it_wakes(tmp_path, monkeypatch):
    """Process 1 is stopped, cannot be killed, and is replaced; it wakes after the run has finished."""
    stopped, real = [], local_processes.kill_groups

    def kill_all_but_one(processes):
        if not stopped:
            stopped.append(processes.pop(1))
        real(processes)

    monkeypatch.setattr(local_processes, "kill_groups", kill_all_but_one)
    with Server() as server:
        stopped_job = job(tmp_path, (1, 1, "step", 5, "stop"))
        engine = LocalEngine(stopped_job, rendezvous=server.address)
        stop = SimpleNamespace(requested=False)
        Supervisor(engine, stopped_job.elastic, tmp_path, server.store, stop).run()
    before = worker_event_log(tmp_path, 1)
    (tmp_path / "met" / "1" / "5" / "1").touch()
    stopped[0].send_signal(signal.SIGCONT)
    assert stopped[0].wait(timeout=20) == 1 and worker_event_log(tmp_path, 1) == before
    check(tmp_path)


def test_an_orphan_of_a_killed_launcher_ends_when_another_takes_over(tmp_path):
    """SIGKILL to the launcher itself: its processes go on, until the next launch claims the run."""
    make_run(tmp_path, (2, 1, "step", 8, "sleep"))
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2]);"
        "from meshwright.train.launch import local_processes;"
        "from meshwright.train.launch.launchers import launch_local;"
        "from meshwright.train.launch.job import Job;"
        "from meshwright.configs.sections.fault_tolerance import ElasticConfig; directory = Path(sys.argv[1]);"
        "local_processes.COORDINATION_SERVICE = [sys.executable, '-c', 'import time; time.sleep(5)'];"
        f"launch_local(Job('run', [*{WORKER!r}, str(directory)], 3, directory, ElasticConfig()))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent.parent)])
    wait_until((tmp_path / "checkpoints" / "6").exists, process=launcher)
    launcher.kill()
    launcher.wait()
    run(tmp_path)
    check(tmp_path)
