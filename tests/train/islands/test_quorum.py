"""Quorum decisions, as pure functions and over sockets."""

import threading
from contextlib import suppress

import pytest
from support.waiting import HANG_SECONDS, wait_until

from meshwright.train.core.rendezvous import Client, MembershipStore, NotAMember, join_member, remove_member
from meshwright.train.islands.quorum import (
    LiveMember,
    PendingDecision,
    QuorumService,
    decide_participants,
    decide_partners,
    decide_start,
    decide_votes,
)
from meshwright.train.launch.local_islands import serve_rendezvous


def alive(*names, **changes):
    base = {"ticket": 1, "step": 10, "active": True, "finished": False, "address": "x:1"}
    return {name: LiveMember(**{**base, **changes.get(name, {})}) for name in names}


def pending(**requests):
    return PendingDecision(0.0, {name: {"ticket": 1, "history": "h", **fields} for name, fields in requests.items()})


def participants(requests, members, *, now=1.0, **rules):
    rules = {"update": 10, "staleness": 5, "patience": 60, "minimum": 1, **rules}
    decision = decide_participants(requests, members, **rules, now=now)
    return decision and sorted(decision["members"])


PARTICIPANTS = {
    "all are there": (pending(a={}, b={}), alive("a", "b"), {}, ["a", "b"]),
    "a live island is awaited": (pending(a={}), alive("a", "b"), {}, None),
    "no longer than patience": (pending(a={}), alive("a", "b"), {"now": 61}, ["a"]),
    "a dead island is not awaited": (pending(a={}), alive("a"), {}, ["a"]),
    "nor an island far behind": (pending(a={}), alive("a", "b", b={"step": 4}), {}, ["a"]),
    "nor one that catches up": (pending(a={}), alive("a", "b", b={"active": False}), {}, ["a"]),
    "nor one that has finished": (pending(a={}), alive("a", "b", b={"finished": True}), {}, ["a"]),
    "a request with an old ticket does not count": (
        pending(a={}, b={"ticket": 0}),
        alive("a", "b"),
        {"now": 61},
        ["a"],
    ),
    "an older history is left out": (pending(a={}, b={"history": "old"}, c={}), alive("a", "b", "c"), {}, ["a", "c"]),
    "a tie is decided by name": (pending(a={"history": "x"}, b={}), alive("a", "b"), {}, ["a"]),
    "too few": (pending(a={}), alive("a"), {"minimum": 2}, []),
}


@pytest.mark.parametrize(("requests", "members", "rules", "expected"), PARTICIPANTS.values(), ids=PARTICIPANTS)
def test_participants_of_a_round(requests, members, rules, expected):
    assert participants(requests, members, **rules) == expected


def votes(**have):
    failures = lambda received: {name: "cut" for name in "abc" if name not in received}
    requests = {name: {"have": list(received), "lost": failures(received)} for name, received in have.items()}
    return PendingDecision(0.0, requests)


VOTES = {
    "all have all": (votes(a="abc", b="abc", c="abc"), {}, "abc"),
    "one payload did not reach one island": (votes(a="abc", b="abc", c="ac"), {}, "ac"),
    "a sender that died after sending counts": (votes(a="abc", b="abc"), {"alive": "ab"}, "abc"),
    "a live island has not voted": (votes(a="abc"), {}, None),
    "and is not waited for any longer": (votes(a="abc"), {"now": 99.0}, "abc"),
    "nor one that has joined again": (votes(a="abc", b="abc"), {"changes": {"c": {"ticket": 2}}}, "abc"),
    "skipped by policy": (votes(a="abc", b="abc", c="ac"), {"policy": "skip"}, ""),
    "too few": (votes(a="a", b="b", c="c"), {}, ""),
}


@pytest.mark.parametrize(("requests", "rules", "expected"), VOTES.values(), ids=VOTES)
def test_payloads_count_if_every_voter_has_them(requests, rules, expected):
    live = alive(*rules.get("alive", "abc"), **rules.get("changes", {}))
    rules = {name: value for name, value in rules.items() if name not in ("alive", "changes")}
    rules = {"policy": "average", "minimum": 1, "patience": 9.0, "now": 1.0} | rules
    decision = decide_votes(requests, dict.fromkeys("abc", 1), live, **rules)
    assert (decision and "".join(decision["count"])) == expected
    if expected == "ac":
        assert decision["lost"] == {"b": "cut"}


def test_islands_start_together_from_the_one_with_most_updates_and_later_ones_bootstrap():
    states = {"a": {"step": 4, "version": "x"}, "b": {"step": 8, "version": "y"}, "c": {"step": 8, "version": "y"}}
    requests, members = pending(**states), alive("a", "b", "c", **{name: {"active": False} for name in "abc"})
    assert decide_start(requests, members, count=4, gather=60, now=1) is None
    assert decide_start(requests, members, count=3, gather=60, now=1) == {"sources": ["b", "c"], "together": True}
    assert decide_start(requests, members, count=4, gather=60, now=61)["sources"] == ["b", "c"]
    assert decide_start(pending(d={}), alive("a", "d", d={"active": False}), count=4, gather=60, now=1) == {
        "sources": ["a"]
    }


def test_partners_are_decided_at_once():
    members = alive("a", "b", "c", "d", b={"step": 4}, c={"finished": True}, d={"active": False})
    assert sorted(decide_partners(members, "a", update=10, staleness=5)["members"]) == ["a"]
    assert sorted(decide_partners(members, "b", update=4, staleness=5)["members"]) == ["a", "b"]


def test_all_islands_get_the_same_decision_and_a_stranger_none():
    rules = {"update": 2, "staleness": 9, "patience": 20.0, "minimum": 1, "history": ""}
    answers = {}
    with serve_rendezvous() as address:

        def ask(name):
            with Client(address, name, ttl=9.0) as client:
                client.join({"step": 2, "active": True, "address": "x:1"})
                ready.wait()
                answers[name] = client.ask("list-participants", within=20.0, key="meet 2", **rules)

        ready = threading.Barrier(3)
        threads = [threading.Thread(target=ask, args=(name,)) for name in "abc"]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        with Client(address, "d") as client, pytest.raises(NotAMember, match="d of epoch -1 is not a member"):
            client.ask("list-participants", within=5.0, key="meet 4", **rules)
    assert answers["a"] == answers["b"] == answers["c"] and sorted(answers["a"]["members"]) == ["a", "b", "c"]


def test_a_pending_decision_is_dropped_when_all_its_callers_have_gone():
    """Else an island that comes an hour later would not wait for others at all."""
    now, looks = [0.0], []
    store = MembershipStore(lambda: now[0])
    service, decisions = QuorumService(store, lambda: (looks.append(now[0]), now[0])[1]), []

    def ask(ticket):
        with suppress(NotAMember):
            request = {"name": "a", "ticket": ticket, "step": 0, "version": "v", "count": 2, "gather": 60.0, "run": "r"}
            decisions.append(service.enter(request))

    def start_waiting():
        ticket = store.change(lambda m, at: join_member(m, "a", now=at, ttl=1e9)).members["a"].ticket
        waits, before = threading.Thread(target=ask, args=(ticket,)), len(looks)
        waits.start()
        wait_until(lambda: len(looks) > before + 2)  # it waits, and nothing is decided
        return ticket, waits

    first, waits = start_waiting()
    store.change(lambda m, at: remove_member(m, "a", first))
    waits.join()
    now[0] = 3600.0
    _, waits = start_waiting()
    assert waits.is_alive()
    now[0] += 61.0
    waits.join(timeout=HANG_SECONDS)
    assert decisions == [{"sources": ["a"], "together": True}]
