"""Which hosts protect each other: of the whole run, and of what is restricted of it."""

import json
import logging
from types import SimpleNamespace

import pytest

from meshwright.checkpoint.redundancy.parity_plan import make_parity_plan
from meshwright.configs.errors import MeshwrightError, UserError
from meshwright.configs.sections.launch import LaunchConfig
from meshwright.configs.sections.training import CheckpointConfig
from meshwright.train.core.event_log import read_events
from meshwright.train.launch.launchers import count_hosts
from meshwright.train.launch.snapshot_agent_process import RemoteSnapshotAgents
from meshwright.train.launch.snapshot_agents import RecoveringEngine, read_last_plan


def plan_of(*, hosts, processes, **checkpoint):
    return make_parity_plan(CheckpointConfig(memory_every=1, **checkpoint), hosts=hosts, processes=processes)


def test_slots_are_spread_over_hosts_in_order():
    plan = plan_of(hosts=2, processes=6)
    assert [plan.host_of(slot) for slot in range(6)] == [0, 0, 0, 1, 1, 1] and plan.slots_of(1) == [3, 4, 5]


REMAINING = {  # slots that remain of four hosts in two racks, changes, (groups, max_lost_hosts)
    "all": (range(4), {}, (((0, 2), (1, 3)), 1)),
    "one of each rack": ([0, 3], {}, (((0, 3),), 1)),
    "one rack": ([2, 3], {}, (((2, 3),), 1)),
    "three": ([0, 1, 3], {"group": 3}, (((0, 1, 3),), 1)),
    "one": ([2], {}, (((2,),), 0)),
    "two, and p+q needs three": ([0, 1], {"parity": "p+q", "group": 4, "domains": []}, (((0, 1),), 0)),
}


@pytest.mark.parametrize(("slots", "changes", "expected"), REMAINING.values(), ids=REMAINING)
def test_remaining_hosts_protect_each_other(slots, changes, expected):
    settings = {"parity": "xor", "group": 2, "domains": ["a", "a", "b", "b"]} | changes
    if settings["group"] == 3:
        settings["domains"] = []
    restricted = plan_of(hosts=4, processes=4, **settings).restrict_to(slots)
    assert (restricted.groups, restricted.max_lost_hosts) == expected and restricted.slots == tuple(slots)


def test_a_host_with_some_of_its_slots_takes_part():
    restricted = plan_of(hosts=2, processes=4, parity="xor").restrict_to([0, 1, 3])
    assert restricted.active_hosts == [0, 1] and restricted.slots_of(1) == [3] and restricted.max_lost_hosts == 1


def test_a_number_of_processes_not_divisible_by_hosts_is_refused():
    with pytest.raises(UserError, match=r"launch.hosts: 3 processes .* 2 hosts"):
        plan_of(hosts=2, processes=3)


@pytest.mark.parametrize(("engine", "expected"), [("local", 1), ("slurm", 2), ("ray", 4), ("agents", 4), ("k8s", 4)])
def test_every_engine_knows_its_hosts(engine, expected):
    settings = LaunchConfig(slurm={"nodes": 2})
    assert count_hosts(engine, settings, processes=4) == expected
    assert count_hosts(engine, LaunchConfig(hosts=3), processes=6) == 3


@pytest.mark.parametrize(
    ("slots", "overrides", "unprotected"), [((0, 1), (), []), ((1,), ("checkpoint.parity=none",), [[1]])]
)
def test_where_parity_is_impossible_trainers_and_the_event_log_are_told(tmp_path, slots, overrides, unprotected):
    (tmp_path / "config.yaml").write_text("{}")
    plan, started = plan_of(hosts=3, processes=3, parity="xor"), []
    engine = SimpleNamespace(
        acquire=lambda slots: None, start=lambda epoch, *, slots, overrides: started.append(overrides)
    )
    agents = SimpleNamespace(plan=plan, run=tmp_path, recover=plan.restrict_to)
    RecoveringEngine(engine, agents).start(2, slots=slots, overrides=())
    assert started == [overrides]
    assert [event["slots"] for event in read_events(tmp_path) if event["event"] == "unprotected"] == unprotected


def test_the_slots_of_the_last_epoch_are_known_to_the_next_launcher(tmp_path):
    plan = plan_of(hosts=3, processes=3, parity="xor")
    line = {"event": "recovery", "hosts": 3, "processes": 3, "slots": [0, 2]}
    (tmp_path / "keepers.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"event": "keeper-lost"}) + "\n")
    assert read_last_plan(tmp_path, plan) == plan.restrict_to([0, 2])
    assert (
        read_last_plan(tmp_path, plan_of(hosts=1, processes=3)) is None
        and read_last_plan(tmp_path / "none", plan) is None
    )


class FakeAgentServer:
    """An agent server with an agent in every slot, on the machine of `machines`."""

    def __init__(self, *machines):
        self.machines, self.connected_slots, self.sent = machines, set(range(len(machines))), []

    def host(self, slot):
        return self.machines[slot]

    def send(self, slot, message):
        self.sent.append((slot, message["settings"]["launch_slots"]))


def test_one_agent_of_a_host_starts_its_snapshot_agent(tmp_path):
    plan, server = plan_of(hosts=2, processes=4, parity="xor"), FakeAgentServer("a", "a", "b", "b")
    launcher = RemoteSnapshotAgents(server, plan, tmp_path, rendezvous="a:1")
    launcher.check(plan)
    assert launcher.start(0, plan) and launcher.start(1, plan) and server.sent == [(0, [0, 1]), (2, [2, 3])]
    server.connected_slots = {1}
    assert launcher.start(0, plan) and not launcher.start(1, plan) and server.sent[2:] == [(1, [0, 1])]


def test_processes_of_a_host_that_are_on_two_machines_are_refused_by_name(tmp_path):
    plan = plan_of(hosts=2, processes=4, parity="xor")
    with pytest.raises(MeshwrightError, match=r"processes \[2, 3\], which should share a host, are on b and c; set it"):
        RemoteSnapshotAgents(FakeAgentServer("a", "a", "b", "c"), plan, tmp_path, rendezvous="a:1").check(plan)


def test_a_group_on_one_machine_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("meshwright"), "propagate", True)
    plan = plan_of(hosts=3, processes=3, parity="xor")
    RemoteSnapshotAgents(FakeAgentServer("a", "b", "c"), plan, tmp_path, rendezvous="a:1").check(plan)
    assert not caplog.text
    RemoteSnapshotAgents(FakeAgentServer("a", "b", "a"), plan, tmp_path, rendezvous="a:1").check(plan)
    assert "hosts [0, 2] of one parity group are all on a" in caplog.text
