"""Which hosts protect each other: of the whole run, and of what is left of it."""

import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.launch import LaunchConfig
from meshwright.configs.training import CheckpointConfig
from meshwright.train.launch.engines import hosts_of
from meshwright.train.launch.protection import planned


def plan_of(*, hosts, processes, **checkpoint):
    return planned(CheckpointConfig(memory_every=1, **checkpoint), hosts=hosts, processes=processes)


def test_slots_are_spread_over_hosts_in_order():
    plan = plan_of(hosts=2, processes=6)
    assert [plan.host_of(slot) for slot in range(6)] == [0, 0, 0, 1, 1, 1] and plan.places_of(1) == [3, 4, 5]


LEFT = {  # slots that are left of four hosts of two racks -> (groups, losses)
    "all": (range(4), {}, (((0, 2), (1, 3)), 1)),
    "one of each rack": ([0, 3], {}, (((0, 3),), 1)),
    "one rack": ([2, 3], {}, (((2, 3),), 1)),
    "three": ([0, 1, 3], {"group": 3}, (((0, 1, 3),), 1)),
    "one": ([2], {}, (((2,),), 0)),
    "two, and p+q needs three": ([0, 1], {"parity": "p+q", "group": 4, "domains": []}, (((0, 1),), 0)),
}


@pytest.mark.parametrize(("slots", "changes", "expected"), LEFT.values(), ids=LEFT)
def test_hosts_that_are_left_protect_each_other(slots, changes, expected):
    settings = {"parity": "xor", "group": 2, "domains": ["a", "a", "b", "b"]} | changes
    if settings["group"] == 3:
        settings["domains"] = []
    left = plan_of(hosts=4, processes=4, **settings).among(slots)
    assert (left.groups, left.losses) == expected and left.slots == tuple(slots)


def test_a_host_of_which_a_part_is_left_is_a_host():
    left = plan_of(hosts=2, processes=4, parity="xor").among([0, 1, 3])
    assert left.present == [0, 1] and left.places_of(1) == [3] and left.losses == 1


def test_processes_that_do_not_share_hosts_evenly_are_refused():
    with pytest.raises(UserError, match="hosts: 3 processes cannot be spread evenly over 2 hosts"):
        plan_of(hosts=2, processes=3)


@pytest.mark.parametrize(("engine", "expected"), [("local", 1), ("slurm", 2), ("ray", 4), ("agents", 4), ("k8s", 4)])
def test_every_engine_knows_its_hosts(engine, expected):
    settings = LaunchConfig(slurm={"nodes": 2})
    assert hosts_of(engine, settings, processes=4) == expected
    assert hosts_of(engine, LaunchConfig(hosts=3), processes=6) == 3
