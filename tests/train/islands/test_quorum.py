"""Who counts: the decisions that islands act on, as pure functions, and asked for at once over sockets."""

import threading
from contextlib import suppress

import pytest
from support.waiting import HANG_SECONDS, wait_until

from meshwright.train.core.rendezvous import Client, MembershipStore, NotAMember, join_member, remove_member
from meshwright.train.islands.quorum import (
    LiveMember,
    Question,
    QuorumService,
    decide_participants,
    decide_roster,
    decide_start,
    decide_votes,
)
from meshwright.train.launch.local_islands import serve_rendezvous


def alive(*names, **changes):
    base = {"ticket": 1, "step": 10, "active": True, "finished": False, "address": "x:1"}
    return {name: LiveMember(**{**base, **changes.get(name, {})}) for name in names}


def asked(since=0.0, **said):
    return Question(since, {name: {"ticket": 1, "history": "h", **more} for name, more in said.items()})


def present(question, there, *, now=1.0, **rules):
    found = decide_participants(
        question, there, **{"update": 10, "staleness": 5, "patience": 60, "minimum": 1, **rules}, now=now
    )
    return found and sorted(found["members"])


MEETINGS = {
    "all are there": (asked(a={}, b={}), alive("a", "b"), {}, ["a", "b"]),
    "one is awaited": (asked(a={}), alive("a", "b"), {}, None),
    "no longer than patience": (asked(a={}), alive("a", "b"), {"now": 61}, ["a"]),
    "one that has died is not awaited": (asked(a={}), alive("a"), {}, ["a"]),
    "nor one far behind": (asked(a={}), alive("a", "b", b={"step": 4}), {}, ["a"]),
    "nor one that catches up": (asked(a={}), alive("a", "b", b={"active": False}), {}, ["a"]),
    "nor one that has finished": (asked(a={}), alive("a", "b", b={"finished": True}), {}, ["a"]),
    "what was asked in an earlier life is void": (asked(a={}, b={"ticket": 0}), alive("a", "b"), {"now": 61}, ["a"]),
    "an older history is left out": (asked(a={}, b={"history": "old"}, c={}), alive("a", "b", "c"), {}, ["a", "c"]),
    "a tie is decided by name": (asked(a={"history": "x"}, b={}), alive("a", "b"), {}, ["a"]),
    "too few do not meet": (asked(a={}), alive("a"), {"minimum": 2}, []),
}


@pytest.mark.parametrize("case", MEETINGS)
def test_who_takes_part(case):
    question, there, rules, wanted = MEETINGS[case]
    assert present(question, there, **rules) == wanted


def votes(**have):
    said = {name: {"have": list(one), "lost": {other: "cut" for other in "abc" if other not in one}}
            for name, one in have.items()}  # fmt: skip
    return Question(0.0, said)


COUNTS = {
    "all have all": (votes(a="abc", b="abc", c="abc"), {}, "abc"),
    "one payload did not reach one": (votes(a="abc", b="abc", c="ac"), {}, "ac"),
    "a sender that died after sending counts": (votes(a="abc", b="abc"), {"there": "ab"}, "abc"),
    "somebody alive has not voted": (votes(a="abc"), {}, None),
    "and is not waited for longer": (votes(a="abc"), {"now": 99.0}, "abc"),
    "nor one that has died and come back": (votes(a="abc", b="abc"), {"lives": {"c": {"ticket": 2}}}, "abc"),
    "skipped by policy": (votes(a="abc", b="abc", c="ac"), {"policy": "skip"}, ""),
    "too few": (votes(a="a", b="b", c="c"), {}, ""),
}


@pytest.mark.parametrize("case", COUNTS)
def test_what_counts_is_what_every_voter_has(case):
    question, rules, wanted = COUNTS[case]
    members, there = dict.fromkeys("abc", 1), alive(*rules.pop("there", "abc"), **rules.pop("lives", {}))
    found = decide_votes(
        question, members, there, **{"policy": "average", "minimum": 1, "patience": 9.0, "now": 1.0} | rules
    )
    assert (found and "".join(found["count"])) == wanted
    if wanted == "ac":
        assert found["lost"] == {"b": "cut"}


def test_the_first_begin_together_from_the_farthest_and_latecomers_from_who_has_begun():
    said = {"a": {"step": 4, "version": "x"}, "b": {"step": 8, "version": "y"}, "c": {"step": 8, "version": "y"}}
    question, there = asked(**said), alive("a", "b", "c", **{name: {"active": False} for name in "abc"})
    assert decide_start(question, there, count=4, gather=60, now=1) is None
    assert decide_start(question, there, count=3, gather=60, now=1) == {"sources": ["b", "c"], "together": True}
    assert decide_start(question, there, count=4, gather=60, now=61)["sources"] == ["b", "c"]
    assert decide_start(asked(d={}), alive("a", "d", d={"active": False}), count=4, gather=60, now=1) == {
        "sources": ["a"]
    }


def test_a_roster_waits_for_nobody():
    there = alive("a", "b", "c", "d", b={"step": 4}, c={"finished": True}, d={"active": False})
    assert sorted(decide_roster(there, "a", update=10, staleness=5)["members"]) == ["a"]
    assert sorted(decide_roster(there, "b", update=4, staleness=5)["members"]) == ["a", "b"]


def test_all_who_ask_are_given_one_answer_and_a_stranger_none():
    rules = {"update": 2, "staleness": 9, "patience": 20.0, "minimum": 1, "history": ""}
    answers = {}
    with serve_rendezvous() as address:

        def ask(name):
            with Client(address, name, ttl=9.0) as client:
                client.join({"step": 2, "active": True, "address": "x:1"})
                ready.wait()
                answers[name] = client.ask("present", within=20.0, key="meet 2", **rules)

        ready = threading.Barrier(3)
        threads = [threading.Thread(target=ask, args=(name,)) for name in "abc"]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        with Client(address, "d") as client, pytest.raises(NotAMember, match="d of epoch -1 is not a member"):
            client.ask("present", within=5.0, key="meet 4", **rules)
    assert answers["a"] == answers["b"] == answers["c"] and sorted(answers["a"]["members"]) == ["a", "b", "c"]


def test_a_question_whose_askers_have_gone_is_asked_anew():
    """Else who comes an hour later is told at once that it has waited long enough."""
    now, looks = [0.0], []
    room = MembershipStore(lambda: now[0])
    arbiter, told = QuorumService(room, lambda: (looks.append(now[0]), now[0])[1]), []

    def ask(ticket):
        with suppress(NotAMember):
            said = {"name": "a", "ticket": ticket, "step": 0, "version": "v", "count": 2, "gather": 60.0, "run": "r"}
            told.append(arbiter.enter(said))

    def come():
        ticket = room.change(lambda m, at: join_member(m, "a", now=at, ttl=1e9)).members["a"].ticket
        waits, before = threading.Thread(target=ask, args=(ticket,)), len(looks)
        waits.start()
        wait_until(lambda: len(looks) > before + 2)  # asked, and not decided
        return ticket, waits

    first, waits = come()
    room.change(lambda m, at: remove_member(m, "a", first))
    waits.join()
    now[0] = 3600.0
    _, waits = come()
    assert waits.is_alive()
    now[0] += 61.0
    waits.join(timeout=HANG_SECONDS)
    assert told == [{"sources": ["a"], "together": True}]
