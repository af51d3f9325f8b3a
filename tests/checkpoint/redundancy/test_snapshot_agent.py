"""Snapshot agents: the snapshot of a lost host is rebuilt to the byte or not at all, and never damaged."""

import itertools
import random
import socket

import numpy as np
import pytest
from support.hosts import Hosts

from meshwright.checkpoint.redundancy import agent_files
from meshwright.checkpoint.redundancy.parity_groups import assign_groups
from meshwright.configs.errors import UserError
from meshwright.parallel.transport import checked_stream
from meshwright.parallel.transport.checked_stream import RequestClient, RequestRefused, RequestServer


def protected_steps(hosts):
    return {agent_files.read_protected(hosts.directory(host)).step for host in range(hosts.plan.hosts)}


@pytest.mark.parametrize(("count", "max_lost_hosts"), [(2, 1), (3, 1), (4, 1), (4, 2), (5, 2)])
def test_any_hosts_that_parity_tolerates_are_rebuilt_to_the_byte(tmp_path, count, max_lost_hosts):
    for number, lost in enumerate(itertools.combinations(range(count), max_lost_hosts)):
        with Hosts(tmp_path / str(number), hosts=count, max_lost_hosts=max_lost_hosts, per_host=2) as hosts:
            hosts.snapshot(1)
            hosts.protect()
            assert protected_steps(hosts) == {1}
            before = {host: hosts.files(host) for host in lost}
            hosts.lose(*lost)
            recovery = hosts.recover()
            assert (recovery.step, recovery.rebuilt) == (1, lost) and "rebuilt from parity" in recovery.note
            for host in lost:
                for name, content in before[host].items():
                    rebuilt = hosts.files(host)[name[0] + ".0"]
                    assert rebuilt == content[: len(rebuilt)] and len(rebuilt) >= len(content.rstrip(b"\0"))
                assert agent_files.read_recovery(hosts.directory(host)) == recovery
            hosts.protect()  # the new hosts keep parity, too
            assert protected_steps(hosts) == {1} and all(1 in agent.parity_members() for agent in hosts.agents.values())


def test_one_lost_host_too_many_is_refused_with_the_reason(tmp_path):
    with Hosts(tmp_path, hosts=4, max_lost_hosts=1) as hosts:
        hosts.snapshot(1)
        hosts.protect()
        hosts.lose(0, 2)
        recovery = hosts.recover()
        assert (
            recovery.step == -1
            and "hosts [0, 2] of group [0, 1, 2, 3]" in recovery.note
            and "loss of 1" in recovery.note
        )


def test_two_hosts_of_different_groups_are_rebuilt_but_not_two_of_one_group(tmp_path):
    with Hosts(tmp_path, hosts=4, max_lost_hosts=1, groups=[[0, 2], [1, 3]]) as hosts:
        hosts.snapshot(5)
        hosts.protect()
        hosts.lose(0, 1)
        assert hosts.recover().rebuilt == (0, 1)
        hosts.protect()
        hosts.lose(0, 2)
        assert "hosts [0, 2] of group [0, 2]" in hosts.recover().note


def test_the_newest_step_that_all_hosts_have_is_recovered_and_the_protected_step_is_kept(tmp_path):
    """Step 3 reached two hosts only when host 2 was lost: step 2 is rebuilt."""
    with Hosts(tmp_path, hosts=3, max_lost_hosts=1) as hosts:
        hosts.snapshot(1)
        hosts.protect()
        hosts.snapshot(2)
        hosts.protect()
        hosts.snapshot(3, hosts=[0, 1])
        hosts.protect()
        assert protected_steps(hosts) == {2}
        hosts.lose(2)
        recovery = hosts.recover()
        assert (recovery.step, recovery.rebuilt) == (2, (2,))


def test_remaining_hosts_protect_each_other_and_snapshots_of_removed_hosts_are_deleted(tmp_path):
    """Hosts 2 and 3 take no part after step 5; later their snapshots of step 5 are outdated."""
    with Hosts(tmp_path, hosts=4, max_lost_hosts=1) as hosts:
        fewer = hosts.plan.restrict_to([0, 1])
        hosts.snapshot(5)
        hosts.protect()
        recovery = hosts.recover(fewer, snapshot_plan=hosts.plan)
        assert recovery.step == -1 and "step 5 were taken in slots [0, 1, 2, 3]; slots [0, 1] go on" in recovery.note
        hosts.snapshot(4, hosts=[0, 1])
        hosts.snapshot(5, hosts=[0, 1])
        hosts.protect()
        assert [agent_files.read_protected(hosts.directory(host)).step for host in (0, 1)] == [5, 5]
        hosts.lose(1)
        assert hosts.recover(fewer, snapshot_plan=fewer).rebuilt == (1,)
        assert hosts.recover(snapshot_plan=fewer).step == -1 and not hosts.files(2) and not hosts.files(3)
        hosts.snapshot(6)
        hosts.protect()
        assert protected_steps(hosts) == {6}
        hosts.lose(3)
        assert hosts.recover(snapshot_plan=hosts.plan).rebuilt == (3,)


def test_parity_of_a_group_of_four_is_not_used_for_a_group_of_two(tmp_path):
    """The epoch of two hosts ended before it took a snapshot: the parity of four hosts has other stripes."""
    with Hosts(tmp_path, hosts=4, max_lost_hosts=1) as hosts:
        fewer = hosts.plan.restrict_to([0, 1])
        hosts.snapshot(5)
        hosts.protect()
        hosts.recover(fewer, snapshot_plan=hosts.plan)
        hosts.lose(1)
        recovery = hosts.recover(fewer, snapshot_plan=fewer)
        assert (
            recovery.step == -1
            and "hosts [1] of group [0, 1]" in recovery.note
            and "hosts [] have parity" in recovery.note
        )


def test_outdated_parity_of_the_same_step_is_not_used(tmp_path):
    """Step 2 was written again after a restart and is not protected yet: the old parity of step 2 has another seal."""
    with Hosts(tmp_path, hosts=3, max_lost_hosts=1) as hosts:
        hosts.snapshot(2)
        hosts.protect()
        for host in range(3):
            hosts.sizes = (500, 800, 100)
            hosts.write(host, host, 2, slot=0)
        hosts.lose(1)
        assert hosts.recover().step == -1
        hosts.snapshot(2)
        hosts.protect()
        hosts.lose(1)
        assert hosts.recover().rebuilt == (1,)


def test_a_slot_that_is_overwritten_while_parity_is_computed_is_noticed(tmp_path):
    with Hosts(tmp_path, hosts=2, max_lost_hosts=1) as hosts:
        hosts.snapshot(1)
        statuses = hosts.statuses()
        hosts.snapshot(3, hosts=[1])  # into the same slot
        hosts.agents[0].protect_newest(statuses)
        assert not hosts.agents[0].parity_members() and "no snapshot" in hosts.agents[0].last_error
        hosts.snapshot(3, hosts=[0])
        hosts.protect()
        assert protected_steps(hosts) == {3} and not hosts.agents[0].last_error


def test_a_new_agent_publishes_the_parity_of_the_agent_that_died(tmp_path):
    with Hosts(tmp_path, hosts=3, max_lost_hosts=1) as hosts:
        hosts.snapshot(1)
        hosts.protect()
        before = hosts.statuses()
        hosts.start(1)
        assert {host: status["parity"] for host, status in hosts.statuses().items()} == {
            host: status["parity"] for host, status in before.items()
        }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_new_agent_rebuilds_after_an_agent_that_died_while_rebuilding(tmp_path, monkeypatch):
    """The unfinished draft does not count as a snapshot, and the next agent starts again."""
    with Hosts(tmp_path, hosts=3, max_lost_hosts=1) as hosts:
        hosts.snapshot(1)
        hosts.protect()
        before = hosts.files(1)
        hosts.lose(1)
        with monkeypatch.context() as patched:
            patched.setattr(
                "meshwright.checkpoint.redundancy.snapshot_agent.accept_rebuild_buffers",
                lambda *_: (_ for _ in ()).throw(SystemExit),
            )
            recovery = hosts.recover()
        assert (recovery.step, recovery.rebuilt) == (-1, ()) and not hosts.files(1)
        hosts.start(1)
        recovery = hosts.recover()
        assert (recovery.step, recovery.rebuilt) == (1, (1,))
        (rebuilt,) = hosts.files(1).values()
        assert before["1.1"][: len(rebuilt)] == rebuilt


def test_no_flipped_bit_of_snapshots_or_parity_is_returned(tmp_path):
    """Each damaged slot is noticed and rebuilt; if a host is lost too, everything is recovered or nothing."""
    random_source, repaired, refused = random.Random(0), 0, 0
    with Hosts(tmp_path, hosts=3, max_lost_hosts=1, sizes=(300, 200, 260)) as hosts:
        hosts.snapshot(1, slot=0)
        hosts.protect()
        good = {host: {path.name: path.read_bytes() for path in hosts.directory(host).glob("*.[01]")}
                for host in range(3)}  # fmt: skip
        for number in range(300):
            for host, files in good.items():
                for path in hosts.directory(host).glob("*.[01]"):
                    path.unlink()
                for name, content in files.items():
                    (hosts.directory(host) / name).write_bytes(content)
            host, file = random_source.choice([(host, file) for host, files in good.items() for file in files])
            content = bytearray(good[host][file])
            place = random_source.randrange(8 * len(content))
            content[place // 8] ^= 1 << place % 8
            (hosts.directory(host) / file).write_bytes(content)
            if number % 2:
                for path in hosts.directory((host + 1) % 3).glob("*.[01]"):
                    path.unlink()
            recovery = hosts.recover()
            if recovery.step < 0:
                refused += 1
                continue
            repaired += bool(recovery.rebuilt)
            for host in range(3):
                name = f"{host}.0"
                payload = slice(64, 64 + hosts.sizes[host])
                assert hosts.files(host)[name][payload] == good[host][name][payload], (host, file, place)
        assert repaired > 60 and refused > 100


def test_swapped_slots_of_a_host_change_its_seal(tmp_path):
    with Hosts(tmp_path, hosts=2, max_lost_hosts=1, per_host=2) as hosts:
        hosts.snapshot(1)
        hosts.protect()
        one, other = (hosts.directory(0) / f"{process}.1" for process in (0, 1))
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second), other.write_bytes(first)
        hosts.lose(1)
        assert hosts.recover().step == -1  # the parity is of other snapshots than host 0 has now


def test_groups_have_hosts_of_different_domains():
    assert assign_groups(8, size=4, max_lost_hosts=1, domains=list("aabbccdd")) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert assign_groups(5, size=8, max_lost_hosts=1) == [[0, 1, 2, 3, 4]]
    with pytest.raises(UserError, match=r"checkpoint.domains: 2 of the hosts .* at most 2"):
        assign_groups(4, size=4, max_lost_hosts=1, domains=list("aabb"))
    with pytest.raises(UserError, match=r"checkpoint.group: 3 hosts in groups of at most 2"):
        assign_groups(3, size=2, max_lost_hosts=1)
    with pytest.raises(UserError, match=r"checkpoint.domains: 1 .* 4 hosts"):
        assign_groups(4, size=4, max_lost_hosts=1, domains=["a"])


def test_a_damaged_frame_and_silence_are_errors():
    with (
        RequestServer(lambda request: ({}, np.arange(5, dtype=np.uint8))) as listener,
        RequestClient(listener.address) as peer,
    ):
        told, content = peer.request({"do": "anything"})
        assert told == {} and content.tolist() == [0, 1, 2, 3, 4]
        assert peer.request({}, into=(place := np.zeros(5, np.uint8)))[1] is place and place.tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(OSError, match="5 bytes, not 4"):
            peer.request({}, into=np.zeros(4, np.uint8))
    with RequestServer(lambda request: {}["absent"]) as listener, pytest.raises(RequestRefused, match="absent"):
        told_by(listener.address)
    sender, receiver = socket.socketpair()
    with sender, receiver:
        checked_stream.send_frame(sender, b"hello")
        frame = bytearray(receiver.recv(100))
        frame[-1] ^= 1
        sender.sendall(frame)
        with pytest.raises(ConnectionError):
            checked_stream.receive_frame(receiver)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OSError, match="snapshot agent at"):
        told_by(f"127.0.0.1:{silent.getsockname()[1]}")  # it takes the connection, and says nothing


def told_by(address):
    with RequestClient(address) as peer:
        return peer.request({}, timeout=0.2)
