"""The four syndromes as a table; then a slow process, a stopped one and a throttled link, each injected and named."""

import contextlib
import json
import logging
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from support.fake_jobs import WORKER, make_run, restarts

from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.train.core.rendezvous import Server
from meshwright.train.launch import network_probe
from meshwright.train.launch.job import Job
from meshwright.train.launch.launchers import launch_local
from meshwright.train.launch.network_probe import Links, collect_links, find_link_faults, measure_links
from meshwright.train.launch.restart_policies import Outcome
from meshwright.train.launch.straggler_detection import WAIT, ProcessActivity, diagnose_hang, diagnose_slowdown
from meshwright.train.launch.telemetry import Telemetry
from meshwright.train.report.straggler_heatmap import processes_section


def links_with(*slow_pairs, count=4):
    """Equal links between `count` machines, but for `slow_pairs`."""
    delays, bandwidths = np.full((count, count), 1e-4), np.full((count, count), 1e9)
    for pair in slow_pairs:
        delays[pair], bandwidths[pair] = 1e-2, 1e8
    for matrix in (delays, bandwidths):
        np.fill_diagonal(matrix, np.nan)
    return Links(delays, bandwidths, np.zeros((count, count)))


def waiting(**changes):
    """Four processes at step 7, all waiting; `p1=...` changes one."""
    usual = {"step": 7, "activity": WAIT, "silent_seconds": 0.2}
    return {index: ProcessActivity(**{**usual, **changes.get(f"p{index}", {})}) for index in range(4)}


# Processes, links: communication, suspects, a part of the evidence.
HANGS = {
    "stopped": (waiting(p2={"silent_seconds": 9.0}), None, False, (2,), "no sign of life for 9 s"),
    "behind": (waiting(p1={"step": 6}), None, False, (1,), "at step 6 (wait), others at 7"),
    "reading data": (waiting(p3={"activity": "input"}), None, False, (3,), "busy with input, others wait"),
    "a disk of all": (waiting(**{f"p{n}": {"activity": "save"} for n in range(4)}), None, False, (), "all are busy"),
    "a link": (waiting(), links_with((0, 3)), True, (0, 3), "the link between 0 and 3"),
    "a machine's links": (waiting(), links_with((0, 2), (2, 1), (3, 2)), True, (2,), "3 of its links"),
    "a device": (waiting(), links_with(), False, (), "doctor --cluster"),
    "not measured": (waiting(), None, True, (), "the links were not measured"),
}


@pytest.mark.parametrize(("processes", "links", "communication", "suspects", "evidence"), HANGS.values(), ids=HANGS)
def test_a_hang_is_diagnosed(processes, links, communication, suspects, evidence):
    diagnosis = diagnose_hang(processes, links)
    assert (diagnosis.kind, diagnosis.communication, diagnosis.suspects) == ("hang", communication, suspects)
    assert evidence in diagnosis.evidence


def busy(*seconds, step=1.0):
    """Processes that take so many seconds of a step by themselves."""
    return {index: ProcessActivity(9, WAIT, 0.1, busy, step) for index, busy in enumerate(seconds)}


# Processes, usual seconds a step, links: None, or (communication, suspects).
SLOW = {
    "all alike": (busy(0.1, 0.12, 0.1), 1.0, None, None),
    "one reads slowly": (busy(0.1, 0.6, 0.1), 1.0, None, (False, (1,))),
    "of two, one": (busy(0.1, 0.6), 1.0, None, (False, (1,))),
    "two of five": (busy(0.1, 0.6, 0.1, 0.7, 0.1), 1.0, None, (False, (1, 3))),
    "not worth a word": (busy(0.001, 0.009, 0.001, step=0.01), 0.01, None, None),
    "slower than before": (busy(0.1, 0.1, 0.1, 0.1, step=3.0), 1.0, links_with((1, 2)), (True, (1, 2))),
    "not slower than before": (busy(0.1, 0.1, 0.1, 0.1, step=1.5), 1.0, links_with((1, 2)), None),
    "slower, links good": (busy(0.1, 0.1, 0.1, 0.1, step=3.0), 1.0, links_with(), (False, ())),
    "nothing known yet": ({0: ProcessActivity(1, WAIT, 0.1), 1: ProcessActivity(1, WAIT, 0.1)}, None, None, None),
}


@pytest.mark.parametrize(("processes", "usual", "links", "expected"), SLOW.values(), ids=SLOW)
def test_a_slowdown_is_diagnosed(processes, usual, links, expected):
    diagnosis = diagnose_slowdown(processes, usual=usual, links=links)
    assert (None if diagnosis is None else (diagnosis.communication, diagnosis.suspects)) == expected


FAULTS = {
    "none": (links_with(), []),
    "a link": (links_with((3, 1)), [(1, 3)]),
    "a machine": (links_with((0, 1), (0, 2), (0, 3)), [(0,)]),
    "a machine and a link": (links_with((0, 1), (0, 2), (0, 3), (0, 4), (2, 3), count=5), [(0,), (2, 3)]),
    "two know no third": (links_with((0, 1), (1, 0), count=2), []),
}


@pytest.mark.parametrize(("links", "expected"), FAULTS.values(), ids=FAULTS)
def test_link_faults_blame_a_machine_before_a_pair(links, expected):
    assert [fault.processes for fault in find_link_faults(links)] == expected


def test_no_connection_is_the_slowest_link():
    links = links_with()
    links.delay[1, 2], links.bandwidth[1, 2] = np.inf, np.nan
    (fault,) = find_link_faults(links)
    assert fault.processes == (1, 2) and fault.evidence == "no connection"


def throttled(rate):
    """A function that connects through a wire of `rate` bytes a second."""

    def dial(address, timeout):
        near, far = socket.socketpair()
        peer = socket.create_connection(address, timeout)

        def pump(source, target, pause):
            with source, target, contextlib.suppress(OSError):
                while received := source.recv(16384):
                    time.sleep(len(received) / rate if pause else 0)
                    target.sendall(received)
                source.shutdown(socket.SHUT_RDWR)

        for source, target, pause in ((far, peer, True), (peer, far, False)):
            threading.Thread(target=pump, args=(source, target, pause), daemon=True).start()
        return Wire(near)

    return dial


class Wire:
    """A socket that ignores TCP's options."""

    def __init__(self, connection):
        self.connection = connection

    def __getattr__(self, name):
        return getattr(self.connection, name)

    def setsockopt(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.connection.close()


def measure_among(count, **dials):
    """Links of `count` machines that are threads; `d1=...` is how machine 1 connects."""
    with Server() as server:
        for number in range(count):
            arguments = {"session": "1", "rendezvous": server.address, "number": number, "processes": count}
            arguments["dial"] = dials.get(f"d{number}", socket.create_connection)
            threading.Thread(target=measure_links, kwargs=arguments, daemon=True).start()
        return collect_links(server.store, session="1", processes=count)


def test_a_throttled_link_is_found_among_good_ones(monkeypatch):
    monkeypatch.setattr(network_probe, "BURST_BYTES", 1 << 20)
    slow_wire, ports = throttled(2e6), {}

    def dial(address, timeout):
        """The wire to the machine that machine 1 measures second is slow."""
        ports.setdefault(address, len(ports))
        return slow_wire(address, timeout) if ports[address] == 1 else socket.create_connection(address, timeout)

    links = measure_among(4, d1=dial)
    partner = int(network_probe.matchings(4)[1][1])
    assert find_link_faults(links)[0].processes == tuple(sorted((1, partner)))  # busy cores may slow others a little
    assert links.bandwidth[1, partner] < 4e6 < np.nanmin(np.delete(links.bandwidth, 1, axis=0))
    assert np.isnan(np.diag(links.delay)).all() and np.nanmax(np.abs(links.offset)) < 0.1


def run(directory, *faults):
    """What `detection.json` says of a run of three workers with these faults."""
    elastic = ElasticConfig(backoff=0.01, hang_factor=2.0, hang_floor=7.0, start_timeout=30, grace=10)
    launch_local(Job("run", [*WORKER, str(make_run(directory, *faults))], 3, directory, elastic))
    return json.loads((directory / "detection.json").read_text())


def test_a_process_that_sleeps_in_every_step_is_diagnosed(tmp_path, idle_coordination_service, monkeypatch, caplog):
    monkeypatch.setenv("WORKER_STEPS", "30")
    monkeypatch.setattr(logging.getLogger("meshwright"), "propagate", True)
    content = run(tmp_path / "run", (1, "any", "step", "any", "slow"))
    assert [
        (diagnosis["kind"], diagnosis["communication"], diagnosis["suspects"]) for diagnosis in content["diagnoses"]
    ] == [("slow", False, [1])]
    assert "slow, not communication: process 1: 0.1" in caplog.text
    last = content["heat"][-1]["own"]
    assert last[1] > 5 * max(last[0], last[2])
    page = processes_section(content)
    assert "process 1: 0.1" in page and page.count("<rect") == 3 * len(content["heat"])


def test_a_stopped_process_is_the_suspect_and_the_syndrome_is_logged(tmp_path, idle_coordination_service):
    content = run(tmp_path / "run", (2, 1, "step", 5, "stop"))
    (event,) = restarts(tmp_path / "run")
    assert event["suspect"] == 2 and event["syndrome"] == "hang, not communication"
    assert "process 2: no sign of life" in event["reason"]
    assert [diagnosis["suspects"] for diagnosis in content["diagnoses"]] == [[2]]


def test_where_all_wait_the_links_are_measured_and_the_worst_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    telemetry = Telemetry(tmp_path, lambda: links_with((0, 1), count=3))
    info = {"step": 4, "phase": "step", "doing": WAIT, "beats": 1, "spent": {WAIT: 1.0}}
    members = {f"1/{number}": SimpleNamespace(info=info) for number in range(3)}
    store = SimpleNamespace(membership=SimpleNamespace(members=members))
    telemetry.update(store, 1, slots=range(3), now=100.0)
    outcome = telemetry.explain_hang(Outcome("failed", "no step for 9 s", 4, 2, 9.0), now=101.0)
    assert outcome.syndrome == "hang, communication" and outcome.suspect == 0
    assert "the link between 0 and 1: 10.00 ms and 100 MB/s" in outcome.reason
    page = processes_section(json.loads((tmp_path / "detection.json").read_text()))
    assert "Bandwidth of a link" in page and "the link between 0 and 1" in page


def test_heat_map_rows_are_slots_and_links_are_measured_again_in_other_slots(tmp_path):
    """Three processes, then two of them in slots 0 and 2: process 1 is slow, and its row is that of slot 2."""
    (tmp_path / "config.yaml").write_text("{}")
    measurements = []
    telemetry = Telemetry(tmp_path, lambda: measurements.append(len(measurements)))
    clock = iter(range(100, 1000, 3))

    def report_steps(epoch, slots, first):
        for step in range(first, first + 10):
            members = {}
            for number, slot in enumerate(slots):
                spent = {"input": step * (0.5 if slot == 2 else 0.01), WAIT: step * (0.01 if slot == 2 else 0.5)}
                info = {"step": step, "phase": "step", "doing": WAIT, "beats": step, "spent": spent}
                members[f"{epoch}/{number}"] = SimpleNamespace(info=info)
            store = SimpleNamespace(membership=SimpleNamespace(members=members))
            telemetry.update(store, epoch, slots=slots, now=float(next(clock)))

    report_steps(1, (0, 1, 2), 1)
    telemetry.measure(130.0), telemetry.measure(131.0)
    report_steps(2, (0, 2), 8)
    telemetry.measure(132.0)
    content = json.loads((tmp_path / "detection.json").read_text())
    assert measurements == [0, 1]
    assert [None in column["own"] for column in content["heat"]].count(True) > 0 and content["heat"][-1]["own"][
        1
    ] is None
    assert content["heat"][-1]["own"][2] > 10 * content["heat"][-1]["own"][0]
    assert [(diagnosis["epoch"], diagnosis["suspects"], diagnosis["slots"]) for diagnosis in content["diagnoses"]] == [
        (1, [2], [2]),
        (2, [1], [2]),
    ]
    page = processes_section(content)
    assert "process 1 (slot 2)" in page and "slot 1" in page
