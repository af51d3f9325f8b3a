"""The four syndromes as a table; then a slow process, a stopped one and a throttled link, each injected and named."""

import contextlib
import json
import logging
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.train.core.event_log import read_events
from meshwright.train.core.rendezvous import Server
from meshwright.train.launch import local_processes, network_probe
from meshwright.train.launch.job import Job
from meshwright.train.launch.launchers import launch_here
from meshwright.train.launch.network_probe import Links, collected, culprits, take_part
from meshwright.train.launch.restart_policies import Outcome
from meshwright.train.launch.straggler_detection import WAIT, Observed, hanging, slow
from meshwright.train.launch.telemetry import Telemetry
from meshwright.train.report.straggler_heatmap import processes_section

WORKER = [sys.executable, str(Path(__file__).parents[2] / "support" / "fake_worker.py")]


def matrices(*slow_pairs, count=4, delay=1e-4, bandwidth=1e9, times=10.0):
    """Links that are alike but for these pairs."""
    delays, widths = np.full((count, count), delay), np.full((count, count), bandwidth)
    for pair in slow_pairs:
        delays[pair], widths[pair] = delay * 100, bandwidth / times
    for matrix in (delays, widths):
        np.fill_diagonal(matrix, np.nan)
    return Links(delays, widths, np.zeros((count, count)))


def all_waiting(**changes):
    """Four processes at step 7, all waiting; `p1=...` changes one."""
    usual = {"step": 7, "doing": WAIT, "silent": 0.2}
    return {number: Observed(**{**usual, **changes.get(f"p{number}", {})}) for number in range(4)}


# What was seen, the links: kind, communication, suspects, a word of the evidence.
HANGS = {
    "stopped": (all_waiting(p2={"silent": 9.0}), None, False, (2,), "no sign of life for 9 s"),
    "behind": (all_waiting(p1={"step": 6}), None, False, (1,), "at step 6 (wait), others at 7"),
    "reading data": (all_waiting(p3={"doing": "input"}), None, False, (3,), "busy with input, others wait"),
    "a disk of all": (all_waiting(**{f"p{n}": {"doing": "save"} for n in range(4)}), None, False, (), "all are busy"),
    "a link": (all_waiting(), matrices((0, 3)), True, (0, 3), "the link between 0 and 3"),
    "a machine's links": (all_waiting(), matrices((0, 2), (2, 1), (3, 2)), True, (2,), "3 of its links"),
    "a device": (all_waiting(), matrices(), False, (), "doctor --cluster"),
    "not measured": (all_waiting(), None, True, (), "the links were not measured"),
}


@pytest.mark.parametrize(("seen", "measured", "communication", "suspects", "word"), HANGS.values(), ids=HANGS)
def test_a_hang_is_named(seen, measured, communication, suspects, word):
    found = hanging(seen, measured)
    assert (found.kind, found.communication, found.suspects) == ("hang", communication, suspects)
    assert word in found.evidence


def working(*own, took=1.0):
    return {number: Observed(9, WAIT, 0.1, seconds, took) for number, seconds in enumerate(own)}


# Own seconds of each, seconds a step, the usual ones, the links: None, or communication, suspects.
SLOW = {
    "all alike": (working(0.1, 0.12, 0.1), 1.0, None, None),
    "one reads slowly": (working(0.1, 0.6, 0.1), 1.0, None, (False, (1,))),
    "of two, one": (working(0.1, 0.6), 1.0, None, (False, (1,))),
    "two of five": (working(0.1, 0.6, 0.1, 0.7, 0.1), 1.0, None, (False, (1, 3))),
    "not worth a word": (working(0.001, 0.009, 0.001, took=0.01), 0.01, None, None),
    "slower than before": (working(0.1, 0.1, 0.1, 0.1, took=3.0), 1.0, matrices((1, 2)), (True, (1, 2))),
    "not slower than before": (working(0.1, 0.1, 0.1, 0.1, took=1.5), 1.0, matrices((1, 2)), None),
    "slower, links good": (working(0.1, 0.1, 0.1, 0.1, took=3.0), 1.0, matrices(), (False, ())),
    "nothing known yet": ({0: Observed(1, WAIT, 0.1), 1: Observed(1, WAIT, 0.1)}, None, None, None),
}


@pytest.mark.parametrize(("seen", "usual", "measured", "wanted"), SLOW.values(), ids=SLOW)
def test_slowness_is_named(seen, usual, measured, wanted):
    found = slow(seen, usual=usual, links=measured)
    assert (None if found is None else (found.communication, found.suspects)) == wanted


CULPRITS = {
    "none": (matrices(), []),
    "a link": (matrices((3, 1)), [(1, 3)]),
    "a machine": (matrices((0, 1), (0, 2), (0, 3)), [(0,)]),
    "a machine and a link": (matrices((0, 1), (0, 2), (0, 3), (0, 4), (2, 3), count=5), [(0,), (2, 3)]),
    "two know no third": (matrices((0, 1), (1, 0), count=2), []),
}


@pytest.mark.parametrize(("measured", "wanted"), CULPRITS.values(), ids=CULPRITS)
def test_links_accuse_machines_before_pairs(measured, wanted):
    assert [found.processes for found in culprits(measured)] == wanted


def test_no_connection_is_the_slowest_link():
    broken = matrices()
    broken.delay[1, 2], broken.bandwidth[1, 2] = np.inf, np.nan
    (found,) = culprits(broken)
    assert found.processes == (1, 2) and found.evidence == "no connection"


def throttled(rate):
    """A way to dial through a wire of so many bytes a second."""

    def dial(place, timeout):
        near, far = socket.socketpair()
        there = socket.create_connection(place, timeout)

        def pump(source, target, pause):
            with source, target, contextlib.suppress(OSError):
                while part := source.recv(16384):
                    time.sleep(len(part) / rate if pause else 0)
                    target.sendall(part)
                source.shutdown(socket.SHUT_RDWR)

        for source, target, pause in ((far, there, True), (there, far, False)):
            threading.Thread(target=pump, args=(source, target, pause), daemon=True).start()
        return Wire(near)

    return dial


class Wire:
    """A socket that takes TCP's options for granted."""

    def __init__(self, line):
        self.line = line

    def __getattr__(self, name):
        return getattr(self.line, name)

    def setsockopt(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.line.close()


def probed(count, **dials):
    """Links of `count` machines that are threads; `d1=...`: how machine 1 dials."""
    with Server() as server:
        for number in range(count):
            words = {"session": "1", "rendezvous": server.address, "number": number, "processes": count}
            dial = dials.get(f"d{number}", socket.create_connection)
            threading.Thread(target=take_part, kwargs={**words, "dial": dial}, daemon=True).start()
        return collected(server.room, session="1", processes=count)


def test_a_throttled_link_is_found_among_good_ones(monkeypatch):
    monkeypatch.setattr(network_probe, "LARGE", 1 << 20)
    slow_wire, ports = throttled(2e6), {}

    def dial(place, timeout):
        """The wire to the one that machine 1 meets second is bad."""
        ports.setdefault(place, len(ports))
        return slow_wire(place, timeout) if ports[place] == 1 else socket.create_connection(place, timeout)

    found = probed(4, d1=dial)
    partner = int(network_probe.matchings(4)[1][1])
    assert culprits(found)[0].processes == tuple(sorted((1, partner)))  # busy cores may slow others a little
    assert found.bandwidth[1, partner] < 4e6 < np.nanmin(np.delete(found.bandwidth, 1, axis=0))
    assert np.isnan(np.diag(found.delay)).all() and np.nanmax(np.abs(found.offset)) < 0.1


@pytest.fixture
def coordination(monkeypatch):
    """No worker here speaks JAX."""
    monkeypatch.setattr(local_processes, "COORDINATOR_HOST", [sys.executable, "-c", "import time; time.sleep(600)"])


def run(directory, *faults):
    keys = ("process", "epoch", "point", "step", "kind")
    directory.mkdir()
    (directory / "config.yaml").write_text("{}")
    (directory / "faults.json").write_text(json.dumps([dict(zip(keys, one, strict=True)) for one in faults]))
    elastic = ElasticConfig(backoff=0.01, hang_factor=2.0, hang_floor=7.0, start_timeout=30, grace=10)
    launch_here(Job("run", [*WORKER, str(directory)], 3, directory, elastic))
    return json.loads((directory / "detection.json").read_text())


def test_a_process_that_sleeps_in_every_step_is_named(tmp_path, coordination, monkeypatch, caplog):
    monkeypatch.setenv("WORKER_STEPS", "30")
    monkeypatch.setattr(logging.getLogger("meshwright"), "propagate", True)
    told = run(tmp_path / "run", (1, "any", "step", "any", "slow"))
    assert [(one["kind"], one["communication"], one["suspects"]) for one in told["diagnoses"]] == [("slow", False, [1])]
    assert "slow, not communication: process 1: 0.1" in caplog.text
    last = told["heat"][-1]["own"]
    assert last[1] > 5 * max(last[0], last[2])
    page = processes_section(told)
    assert "process 1: 0.1" in page and page.count("<rect") == 3 * len(told["heat"])


def test_a_stopped_process_is_named_with_its_syndrome(tmp_path, coordination):
    told = run(tmp_path / "run", (2, 1, "step", 5, "stop"))
    (event,) = [event for event in read_events(tmp_path / "run") if event["event"] == "restart"]
    assert event["suspect"] == 2 and event["syndrome"] == "hang, not communication"
    assert "process 2: no sign of life" in event["reason"]
    assert [one["suspects"] for one in told["diagnoses"]] == [[2]]


def test_a_hang_in_which_all_wait_has_the_links_measured_and_names_the_worst(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    telemetry = Telemetry(tmp_path, lambda: matrices((0, 1), count=3))
    info = {"step": 4, "phase": "step", "doing": WAIT, "beats": 1, "spent": {WAIT: 1.0}}
    members = {f"1/{number}": SimpleNamespace(info=info) for number in range(3)}
    room = SimpleNamespace(membership=SimpleNamespace(members=members))
    telemetry.look(room, 1, slots=range(3), now=100.0)
    outcome = telemetry.explained(Outcome("failed", "no step for 9 s", 4, 2, 9.0), now=101.0)
    assert outcome.syndrome == "hang, communication" and outcome.suspect == 0
    assert "the link between 0 and 1: 10.00 ms and 100 MB/s" in outcome.reason
    page = processes_section(json.loads((tmp_path / "detection.json").read_text()))
    assert "Bandwidth of a link" in page and "the link between 0 and 1" in page


def test_a_run_of_changing_processes_keeps_its_rows_and_measures_the_links_it_has(tmp_path):
    """Three processes, then two of them in slots 0 and 2: process 1 is slow, and its row is that of slot 2."""
    (tmp_path / "config.yaml").write_text("{}")
    measured = []
    telemetry = Telemetry(tmp_path, lambda: measured.append(len(measured)))
    clock = iter(range(100, 1000, 3))

    def steps(epoch, slots, first):
        for step in range(first, first + 10):
            members = {}
            for number, slot in enumerate(slots):
                spent = {"input": step * (0.5 if slot == 2 else 0.01), WAIT: step * (0.01 if slot == 2 else 0.5)}
                info = {"step": step, "phase": "step", "doing": WAIT, "beats": step, "spent": spent}
                members[f"{epoch}/{number}"] = SimpleNamespace(info=info)
            room = SimpleNamespace(membership=SimpleNamespace(members=members))
            telemetry.look(room, epoch, slots=slots, now=float(next(clock)))

    steps(1, (0, 1, 2), 1)
    telemetry.measure(130.0), telemetry.measure(131.0)
    steps(2, (0, 2), 8)
    telemetry.measure(132.0)
    told = json.loads((tmp_path / "detection.json").read_text())
    assert measured == [0, 1]
    assert [None in column["own"] for column in told["heat"]].count(True) > 0 and told["heat"][-1]["own"][1] is None
    assert told["heat"][-1]["own"][2] > 10 * told["heat"][-1]["own"][0]
    assert [(one["epoch"], one["suspects"], one["slots"]) for one in told["diagnoses"]] == [
        (1, [2], [2]),
        (2, [1], [2]),
    ]
    page = processes_section(told)
    assert "process 1 (slot 2)" in page and "slot 1" in page
