"""Membership in any order of joins, heartbeats, leaves and expiries, as pure functions and over a socket."""

import socket
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.train.core.rendezvous import (  # fmt: skip
    Client,
    Membership,
    MembershipStore,
    NotAMember,
    Server,
    answer_request,
    expire_members,
    join_member,
    record_heartbeat,
    remove_member,
)

NAMES = ("a", "b", "c")
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["join", "beat", "leave", "pass"]), st.sampled_from(NAMES), st.floats(0, 4)), max_size=40
)


@settings(max_examples=200, deadline=None)
@given(actions=ACTIONS)
def test_members_are_those_with_a_heartbeat_within_the_time_to_live(actions):
    """Against a dictionary of last words; every change of the set is a new epoch, and no change is none."""
    membership, last_heartbeat, tickets, now = Membership(), {}, {}, 0.0
    for action, name, seconds in actions:
        now += seconds
        before = membership = expire_members(membership, now=now)
        last_heartbeat = {one: last for one, last in last_heartbeat.items() if last + 5.0 > now}
        assert set(membership.members) == set(last_heartbeat)
        if action == "join":
            membership = join_member(membership, name, now=now, ttl=5.0)
            last_heartbeat[name], tickets[name] = now, membership.epoch
        elif action in ("beat", "leave") and name not in last_heartbeat:
            with pytest.raises(NotAMember, match="is not a member"):
                record_heartbeat(membership, name, tickets.get(name, 0), now=now, info={})
        elif action == "beat":
            membership = record_heartbeat(membership, name, tickets[name], now=now, info={"step": 1})
            last_heartbeat[name] = now
        elif action == "leave":
            membership = remove_member(membership, name, tickets[name])
            del last_heartbeat[name]
        assert membership.epoch - before.epoch == (action == "join" or set(membership.members) != set(before.members))


def test_a_member_whose_name_was_given_to_another_is_refused():
    """A process that was stopped and declared dead, and wakes up."""
    first = join_member(Membership(), "a", now=0.0)
    second = join_member(first, "a", now=1.0)
    record_heartbeat(second, "a", second.members["a"].ticket, now=1.0, info={})
    with pytest.raises(NotAMember, match=r"a of epoch 1 .* in epoch 2"):
        record_heartbeat(second, "a", first.members["a"].ticket, now=1.0, info={})


def test_two_members_that_expire_together_are_one_new_epoch():
    membership = join_member(join_member(Membership(), "a", now=0.0, ttl=1.0), "b", now=0.5, ttl=1.0)
    assert expire_members(membership, now=0.9) is membership
    assert expire_members(membership, now=2.0) == Membership(3, {})


def test_a_wait_ends_with_a_new_epoch_or_the_timeout():
    """By a clock of the test: the member's time is over while somebody waits for that."""
    now = [0.0]
    store = MembershipStore(lambda: now[0])
    store.change(lambda m, at: join_member(m, "a", now=at, ttl=5.0))
    waited = []
    thread = threading.Thread(target=lambda: waited.append(store.wait(beyond=1, timeout=60.0)))
    thread.start()
    assert store.membership.epoch == 1
    now[0] = 6.0
    store.change(lambda m, at: m)  # any request finds the expired
    thread.join(timeout=10)
    assert waited[0] == Membership(2, {}) and store.wait(beyond=2, timeout=0.0).epoch == 2


def test_members_join_and_leave_over_a_socket():
    with Server() as server, Client(server.address, "a") as a, Client(server.address, "b") as b:
        one = {"port": 1, "ticket": 1}
        assert a.join({"port": 1})["members"] == {"a": one}
        b.join()
        assert b.heartbeat({"step": 7}) == {"epoch": 2, "members": {"a": one, "b": {"step": 7, "ticket": 2}}}
        gone = threading.Timer(0.05, b.leave)
        gone.start()
        assert a.wait(beyond=2, timeout=10.0) == {"epoch": 3, "members": {"a": one}}
        gone.join()
        with pytest.raises(NotAMember):
            b.heartbeat()
    with pytest.raises(OSError, match=r"rendezvous 127\.0\.0\.1"):
        Client(server.address, "c", timeout=1.0).join()


def test_a_silent_member_expires_while_others_wait():
    with Server() as server, Client(server.address, "a") as a, Client(server.address, "b", ttl=0.2) as b:
        a.join()
        b.join()
        assert list(a.wait(beyond=2, timeout=60.0)["members"]) == ["a"]


@pytest.mark.parametrize("line", [b"", b"x\n", b"[]\n", b'{"do": "dance"}\n', b'{"do": "join", "name": "a"}\n'])
def test_a_malformed_request_gets_an_error_and_changes_nothing(line):
    store = MembershipStore()
    assert "error" in answer_request(store, line) and store.membership == Membership()


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's table of connections")
def test_connections_have_keepalive_so_that_vanished_machines_are_noticed():
    """A site that loses its power hangs up on nobody; only the kernel's probes end such a connection."""
    with Server() as server, socket.create_connection(address_of(server)) as member:
        member.sendall(b"{}\n")
        member.recv(100)
        here = [f":{port:04X}" for port in (address_of(server)[1], member.getsockname()[1])]
        (line,) = [words for words in map(str.split, Path("/proc/net/tcp").read_text().splitlines())
                   if words[1].endswith(here[0]) and words[2].endswith(here[1])]  # fmt: skip
    assert line[5].startswith("02:")  # the timer that runs is keepalive's


def address_of(server):
    host, _, port = server.address.rpartition(":")
    return host, int(port)
