"""The self-test of many machines: who stands out, and a real one of two processes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from meshwright.train.doctor.cluster_selftest import find_problems
from meshwright.train.launch.network_probe import Links

GOOD = {
    "host": "a", "devices": ["H100"] * 2, "products": [1e12, 1e12], "memory": 1 << 36, "used": 0.2, "written": 1e9,
    "sync": 0.01, "collective": {"outcome": "right", "detail": "", "seconds": 0.01},
}  # fmt: skip


def equal_links(count=3):
    away = np.where(np.eye(count) > 0, np.nan, 1.0)
    return Links(1e-4 * away, 1e9 * away, 0.0 * away)


def skewed_clock():
    links = equal_links()
    links.offset[0, 2] = -90.0
    return links


def slow_link():
    links = equal_links()
    links.bandwidth[1, 2] = 1e7
    return links


# What process 1 reports instead, the links, a part of the problem; None: no problem.
CASES = {
    "nothing": ({}, equal_links(), None),
    "a slow device": (
        {"products": [1e12, 5e11]},
        equal_links(),
        "process 1 on a, device 1: 500 GFLOP/s, the median device 1000",
    ),
    "a device is missing": ({"devices": ["H100"], "products": [1e12]}, equal_links(), "1 x H100, others 2 x H100"),
    "a wrong sum": (
        {"collective": {"outcome": "wrong", "detail": "devices 2", "seconds": 1.0}},
        equal_links(),
        "devices 2",
    ),
    "a slow disk": ({"written": 1e8}, equal_links(), "process 1 on a writes 95.4 MiB/s, the median one 954 MiB/s"),
    "a disk that hangs": ({"sync": 3.0}, equal_links(), "syncing a small file took 3.0 s"),
    "a full memory": ({"used": 0.97}, equal_links(), "97% of the memory"),
    "a clock": ({}, skewed_clock(), "process 2: its clock is -90.0 s off"),
    "a link": ({}, slow_link(), "the link between processes 1 and 2: 0.10 ms and 10 MB/s"),
}


@pytest.mark.parametrize(("change", "links", "expected"), CASES.values(), ids=CASES)
def test_a_machine_that_stands_out_is_named(change, links, expected):
    reports = {0: GOOD, 1: GOOD | change, 2: GOOD}
    problems = [problem.what for problem in find_problems(reports, links, processes=3)]
    assert problems == [] if expected is None else len(problems) == 1 and expected in problems[0], problems


def test_a_process_without_a_report_is_named():
    (problem,) = find_problems({0: GOOD, 2: GOOD}, equal_links(), processes=3)
    assert "processes [1]" in problem.what


def doctor(directory, *options):
    command = [sys.executable, "-m", "meshwright.train.cli", "doctor", "--cluster", *options]
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_two_processes_of_this_machine_measure_each_other(tmp_path):
    done = doctor(tmp_path, "--processes", "2", "--devices-per-process", "2", "--json")
    result = json.loads(done.stdout[done.stdout.index("{") :])
    assert [len(report["devices"]) for report in result["processes"].values()] == [2, 2], done.stderr
    assert [report["collective"]["outcome"] for report in result["processes"].values()] == ["right", "right"]
    assert result["links"]["bandwidth"][0][1] > 0 and not list(tmp_path.iterdir())
    assert done.returncode == int(bool(result["problems"])), "its verdict is the exit code"


def test_an_unsupported_engine_is_the_users_mistake(tmp_path):
    done = doctor(tmp_path, "--engine", "k8s")
    assert done.returncode == 2 and "--engine: k8s matches nothing; there are agents, local, ray, slurm" in done.stderr
