"""Process info from the variables of the launcher, of SLURM, or without any."""

import pytest

from meshwright.configs.errors import UserError
from meshwright.train.core.process_env import ProcessInfo, first_host, read_process_info

LAUNCHED = {"MESHWRIGHT_COORDINATOR": "h:1", "MESHWRIGHT_PROCESSES": "4", "MESHWRIGHT_PROCESS": "3"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_PROCID": "2", "SLURM_JOB_ID": "4097", "SLURM_JOB_NODELIST": "gpu[07-09]"}
ENVIRONMENTS = {
    "alone": ({}, ProcessInfo()),
    "launched": (LAUNCHED, ProcessInfo(3, 4, "h:1")),
    "launched with devices": (LAUNCHED | {"MESHWRIGHT_DEVICES_PER_PROCESS": "2"}, ProcessInfo(3, 4, "h:1", 2)),
    "slurm": (SLURM, ProcessInfo(2, 8, "gpu07:61001")),
    "slurm, one task": (SLURM | {"SLURM_NTASKS": "1"}, ProcessInfo()),
}


@pytest.mark.parametrize(("environment", "expected"), ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_process_info_from_the_environment(environment, expected):
    assert read_process_info(environment) == expected


def test_the_environment_of_a_process_is_read_back():
    info = ProcessInfo(1, 4, "h:1", 2, epoch=3, rendezvous="h:2", external_coordinator=True, slot=5, host=0)
    assert read_process_info(info.to_environment()) == info


NODES = {"gpu[07-09,12],x": "gpu07", "a,b": "a", "n[3,5]": "n3", "solo": "solo"}


@pytest.mark.parametrize(("nodes", "host"), NODES.items())
def test_first_host(nodes, host):
    assert first_host(nodes) == host


def test_an_incomplete_environment_is_refused():
    with pytest.raises(UserError, match="MESHWRIGHT_PROCESS is not a number"):
        read_process_info({key: value for key, value in LAUNCHED.items() if key != "MESHWRIGHT_PROCESS"})
