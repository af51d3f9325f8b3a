"""Keepers: what a lost host had comes back from the others to the byte, or not at all, and nothing damaged does."""

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


def protected(hosts):
    return {agent_files.read_protected(hosts.directory(host)).step for host in range(hosts.plan.hosts)}


@pytest.mark.parametrize(("count", "losses"), [(2, 1), (3, 1), (4, 1), (4, 2), (5, 2)])
def test_any_hosts_the_parity_bears_come_back_to_the_byte(tmp_path, count, losses):
    for number, lost in enumerate(itertools.combinations(range(count), losses)):
        with Hosts(tmp_path / str(number), hosts=count, losses=losses, per_host=2) as hosts:
            hosts.snapshot(1)
            hosts.protect()
            assert protected(hosts) == {1}
            before = {host: hosts.files(host) for host in lost}
            hosts.lose(*lost)
            word = hosts.recover()
            assert (word.step, word.rebuilt) == (1, lost) and "rebuilt from parity" in word.note
            for host in lost:
                for name, content in before[host].items():
                    found = hosts.files(host)[name[0] + ".0"]
                    assert found == content[: len(found)] and len(found) >= len(content.rstrip(b"\0"))
                assert agent_files.read_recovery(hosts.directory(host)) == word
            hosts.protect()  # the new hosts keep parity, too
            assert protected(hosts) == {1} and all(1 in agent.shares() for agent in hosts.agents.values())


def test_one_more_than_the_parity_bears_is_refused_with_the_reason(tmp_path):
    with Hosts(tmp_path, hosts=4, losses=1) as hosts:
        hosts.snapshot(1)
        hosts.protect()
        hosts.lose(0, 2)
        word = hosts.recover()
        assert word.step == -1 and "hosts [0, 2] of group [0, 1, 2, 3] lost" in word.note and "loss of 1" in word.note


def test_two_hosts_of_different_groups_come_back_and_a_group_bears_only_its_own(tmp_path):
    with Hosts(tmp_path, hosts=4, losses=1, groups=[[0, 2], [1, 3]]) as hosts:
        hosts.snapshot(5)
        hosts.protect()
        hosts.lose(0, 1)
        assert hosts.recover().rebuilt == (0, 1)
        hosts.protect()
        hosts.lose(0, 2)
        assert "hosts [0, 2] of group [0, 2]" in hosts.recover().note


def test_the_newest_step_that_all_have_is_used_and_the_protected_one_stays(tmp_path):
    """Step 3 reached two hosts only when host 2 was lost: step 2 is rebuilt."""
    with Hosts(tmp_path, hosts=3, losses=1) as hosts:
        hosts.snapshot(1)
        hosts.protect()
        hosts.snapshot(2)
        hosts.protect()
        hosts.snapshot(3, hosts=[0, 1])
        hosts.protect()
        assert protected(hosts) == {2}
        hosts.lose(2)
        word = hosts.recover()
        assert (word.step, word.rebuilt) == (2, (2,))


def test_fewer_hosts_protect_each_other_and_what_the_others_left_is_no_more(tmp_path):
    """Hosts 2 and 3 are left out at step 5; later, what they have of it is of another time line."""
    with Hosts(tmp_path, hosts=4, losses=1) as hosts:
        fewer = hosts.plan.restrict_to([0, 1])
        hosts.snapshot(5)
        hosts.protect()
        word = hosts.recover(fewer, snapshot_plan=hosts.plan)
        assert word.step == -1 and "step 5 were taken in slots [0, 1, 2, 3]; slots [0, 1] go on" in word.note
        hosts.snapshot(4, hosts=[0, 1])
        hosts.snapshot(5, hosts=[0, 1])
        hosts.protect()
        assert [agent_files.read_protected(hosts.directory(host)).step for host in (0, 1)] == [5, 5]
        hosts.lose(1)
        assert hosts.recover(fewer, snapshot_plan=fewer).rebuilt == (1,)
        assert hosts.recover(snapshot_plan=fewer).step == -1 and not hosts.files(2) and not hosts.files(3)
        hosts.snapshot(6)
        hosts.protect()
        assert protected(hosts) == {6}
        hosts.lose(3)
        assert hosts.recover(snapshot_plan=hosts.plan).rebuilt == (3,)


def test_parity_of_four_is_not_read_as_parity_of_two(tmp_path):
    """The epoch of two ended before it had a snapshot: what four protected is of other stripes."""
    with Hosts(tmp_path, hosts=4, losses=1) as hosts:
        fewer = hosts.plan.restrict_to([0, 1])
        hosts.snapshot(5)
        hosts.protect()
        hosts.recover(fewer, snapshot_plan=hosts.plan)
        hosts.lose(1)
        word = hosts.recover(fewer, snapshot_plan=fewer)
        assert word.step == -1 and "with the parity that hosts [] have they cannot be rebuilt" in word.note


def test_parity_of_an_overwritten_time_line_is_not_mixed_in(tmp_path):
    """Step 2 was written anew after a restart and is not protected yet: the old parity of step 2 is of another seal."""
    with Hosts(tmp_path, hosts=3, losses=1) as hosts:
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


def test_what_is_overwritten_while_it_is_read_is_noticed(tmp_path):
    with Hosts(tmp_path, hosts=2, losses=1) as hosts:
        hosts.snapshot(1)
        infos = hosts.infos()
        hosts.snapshot(3, hosts=[1])  # into the same slot
        hosts.agents[0].look(infos)
        assert not hosts.agents[0].shares() and "no snapshot" in hosts.agents[0].trouble
        hosts.snapshot(3, hosts=[0])
        hosts.protect()
        assert protected(hosts) == {3} and not hosts.agents[0].trouble


def test_a_keeper_that_died_is_followed_by_one_that_knows_as_much(tmp_path):
    with Hosts(tmp_path, hosts=3, losses=1) as hosts:
        hosts.snapshot(1)
        hosts.protect()
        before = hosts.infos()
        hosts.start(1)
        assert {host: info["shares"] for host, info in hosts.infos().items()} == {
            host: info["shares"] for host, info in before.items()
        }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_keeper_that_dies_while_it_rebuilds_is_followed_by_one_that_does(tmp_path, monkeypatch):
    """What it had put together is not taken for a snapshot, and the next one begins anew."""
    with Hosts(tmp_path, hosts=3, losses=1) as hosts:
        hosts.snapshot(1)
        hosts.protect()
        before = hosts.files(1)
        hosts.lose(1)
        with monkeypatch.context() as patched:
            patched.setattr(
                "meshwright.checkpoint.redundancy.snapshot_agent.accept", lambda *_: (_ for _ in ()).throw(SystemExit)
            )
            word = hosts.recover()
        assert (word.step, word.rebuilt) == (-1, ()) and not hosts.files(1)
        hosts.start(1)
        word = hosts.recover()
        assert (word.step, word.rebuilt) == (1, (1,))
        (found,) = hosts.files(1).values()
        assert before["1.1"][: len(found)] == found


def test_no_flipped_bit_of_memory_or_parity_is_returned(tmp_path):
    """Each flip: a slot or a share is damaged, seen, and rebuilt; with a host lost too, all or nothing comes back."""
    draw, repaired, refused = random.Random(0), 0, 0
    with Hosts(tmp_path, hosts=3, losses=1, sizes=(300, 200, 260)) as hosts:
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
            host, file = draw.choice([(host, file) for host, files in good.items() for file in files])
            content = bytearray(good[host][file])
            place = draw.randrange(8 * len(content))
            content[place // 8] ^= 1 << place % 8
            (hosts.directory(host) / file).write_bytes(content)
            if number % 2:
                for path in hosts.directory((host + 1) % 3).glob("*.[01]"):
                    path.unlink()
            word = hosts.recover()
            if word.step < 0:
                refused += 1
                continue
            repaired += bool(word.rebuilt)
            for host in range(3):
                name = f"{host}.0"
                payload = slice(64, 64 + hosts.sizes[host])
                assert hosts.files(host)[name][payload] == good[host][name][payload], (host, file, place)
        assert repaired > 60 and refused > 100


def test_swapped_slots_of_a_host_are_told_apart_by_their_seal(tmp_path):
    with Hosts(tmp_path, hosts=2, losses=1, per_host=2) as hosts:
        hosts.snapshot(1)
        hosts.protect()
        one, other = (hosts.directory(0) / f"{process}.1" for process in (0, 1))
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second), other.write_bytes(first)
        hosts.lose(1)
        assert hosts.recover().step == -1  # the parity is of other snapshots than host 0 has now


def test_groups_take_hosts_of_different_domains():
    assert assign_groups(8, size=4, losses=1, domains=list("aabbccdd")) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert assign_groups(5, size=8, losses=1) == [[0, 1, 2, 3, 4]]
    with pytest.raises(UserError, match=r"checkpoint.domains: 2 of the hosts .* at most 2"):
        assign_groups(4, size=4, losses=1, domains=list("aabb"))
    with pytest.raises(UserError, match="leave a group of 1, and parity that bears 1 needs at least 2"):
        assign_groups(3, size=2, losses=1)
    with pytest.raises(UserError, match="names the domains of 1 hosts, and there are 4"):
        assign_groups(4, size=4, losses=1, domains=["a"])


def test_a_damaged_frame_and_silence_are_errors():
    with (
        RequestServer(lambda request: ({}, np.arange(5, dtype=np.uint8))) as listener,
        RequestClient(listener.address) as peer,
    ):
        told, content = peer.request({"do": "anything"})
        assert told == {} and content.tolist() == [0, 1, 2, 3, 4]
        assert peer.request({}, into=(place := np.zeros(5, np.uint8)))[1] is place and place.tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(OSError, match="gave 5 bytes where 4 were asked for"):
            peer.request({}, into=np.zeros(4, np.uint8))
    with RequestServer(lambda request: {}["absent"]) as listener, pytest.raises(RequestRefused, match="absent"):
        told_by(listener.address)
    one, other = socket.socketpair()
    with one, other:
        checked_stream.send(one, b"hello")
        frame = bytearray(other.recv(100))
        frame[-1] ^= 1
        one.sendall(frame)
        with pytest.raises(ConnectionError, match="damaged on its way"):
            checked_stream.receive(other)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(OSError, match="keeper at"):
        told_by(f"127.0.0.1:{silent.getsockname()[1]}")  # it takes the connection, and says nothing


def told_by(address):
    with RequestClient(address) as peer:
        return peer.request({}, timeout=0.2)
