"""What islands do to each other at a meeting: members in threads, real sockets, payloads that are a few bytes."""

import threading
import time
from contextlib import ExitStack, suppress

import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.sections.islands import IslandsConfig
from meshwright.parallel.transport.payload_server import PayloadServer, Peer, ServerSettings
from meshwright.train.core.rendezvous import Client, NotAMember
from meshwright.train.islands import quorum
from meshwright.train.islands.membership import IslandGroup
from meshwright.train.launch.local_islands import serve_rendezvous

QUICK = {"patience": 2, "timeout": 2, "deadline": 5, "retries": 1, "ttl": 1, "gather": 5, "staleness": 9, "count": 3}


@pytest.fixture
def opened():
    """Opens islands by number: `islands = opened(0, 1, 2)`, all of which have begun."""
    with ExitStack() as stack:
        address = stack.enter_context(serve_rendezvous())

        def member(number, **changes):
            office = PayloadServer(
                f"island-{number}", fingerprint="one", description={}, settings=ServerSettings(2.0, 0.2, 1)
            )
            stack.callback(office.close)
            islands = IslandsConfig(**QUICK | changes, meet=address)
            bad = lambda name, payload: "not finite" if payload == b"nan" else None
            made = IslandGroup(office, islands, address=f"127.0.0.1:{office.port}", find_problem=bad)
            stack.callback(made.leave)
            return made

        def begun(*numbers, **changes):
            made = [member(number, **{"count": len(numbers)} | changes) for number in numbers]
            assert all(first for first, _ in at_once(lambda one: one.enter(step=0, version="x"), made))
            return made

        begun.member = member
        yield begun


def at_once(work, members):
    """What each of `members` makes of `work`, all at the same time."""
    results = {}
    threads = [threading.Thread(target=lambda m=m: results.update({m.name: work(m)})) for m in members]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return [results[m.name] for m in members]


def average(members, payloads, key="meet 3", histories=None, update=3):
    histories = histories or {}

    def work(one):
        return one.average(key, payloads[one.name], update=update, history=histories.get(one.name, ""))

    return at_once(work, members)


def test_one_who_leaves_while_it_waits_is_answered_and_does_not_come_back(opened):
    one, other = opened(0, 1, patience=30, deadline=30, ttl=30)  # it does not merely expire
    waits = threading.Thread(target=lambda: average([one], {one.name: b"1"}))
    waits.start()
    time.sleep(0.3)
    one.leave()
    waits.join(timeout=5)
    assert not waits.is_alive()
    time.sleep(0.5)
    assert one.name not in other.others()


def letters(members):
    return {one.name: one.name.encode() for one in members}


def test_all_have_the_same_payloads(opened):
    islands = opened(0, 1, 2)
    for met in average(islands, letters(islands)):
        assert met.kind == "applied" and met.payloads == letters(islands) and not met.lost


def test_one_that_is_not_finite_is_left_out_by_all_and_takes_their_state(opened):
    islands = opened(0, 1, 2)
    payloads = letters(islands) | {"island-1": b"nan"}
    first, bad, last = average(islands, payloads)
    assert first.kind == last.kind == "applied" and sorted(first.payloads) == ["island-0", "island-2"]
    assert first.lost == {"island-1": "not finite"} and first.payloads == last.payloads
    assert bad.kind == "behind" and [peer.name for peer in bad.sources] == ["island-0", "island-2"]


def test_one_with_an_older_history_takes_the_others_state(opened):
    islands = opened(0, 1, 2)
    mets = average(islands, letters(islands), histories={"island-0": "old"})
    assert [met.kind for met in mets] == ["behind", "applied", "applied"] and "island-0" not in mets[1].payloads


def test_one_that_comes_late_takes_what_the_others_took_unless_its_history_is_another(opened):
    islands = opened(0, 1, 2, patience=0.5)
    early = average(islands[:2], letters(islands))
    assert [met.kind for met in early] == ["applied", "applied"] and len(early[0].payloads) == 2
    (late,) = average(islands[2:], letters(islands))
    assert late.kind == "applied" and late.payloads == early[0].payloads and "island-2" in late.lost
    (other,) = average(islands[2:], letters(islands), histories={"island-2": "old"})
    assert other.kind == "behind" and len(other.sources) == 2


def test_an_exchange_that_was_decided_has_one_result_however_often_it_is_asked_for(opened):
    islands = opened(0, 1)
    once, again = average(islands, letters(islands)), average(islands, letters(islands))
    assert [dict(met.payloads) for met in once] == [dict(met.payloads) for met in again]


def test_what_the_others_did_long_ago_is_not_decided_anew(opened, monkeypatch):
    monkeypatch.setattr(quorum, "MAX_DECISIONS", 4)
    first, asleep = opened(0, 1, patience=0.1)
    meet = lambda one, update: one.average(f"send-0 {update}", b"1", update=update, history="")
    swap = lambda one, update: one.pair(f"meet {update}", b"1", update=update, seed=0)
    for way in (meet, swap):
        assert [way(first, update).kind for update in range(3, 9)] == ["applied"] * 6
        late = way(asleep, 3)
        assert (late.kind, [peer.name for peer in late.sources]) == ("behind", ["island-0"])
    assert swap(asleep, 8).kind == "applied"  # the newest are remembered


def test_a_rendezvous_that_outlives_a_run_does_not_answer_the_next_one_with_its_decisions(opened, monkeypatch):
    monkeypatch.setattr(quorum, "MAX_DECISIONS", 4)
    earlier = opened(0, 1)
    for update in range(3, 9):
        average(earlier, letters(earlier), key=f"meet {update}", update=update)
    [one.leave() for one in earlier]
    islands = opened(0, 1)
    for update in (3, 8):
        mets = average(islands, letters(islands), key=f"meet {update}", update=update)
        assert [(met.kind, met.payloads) for met in mets] == [("applied", letters(islands))] * 2


def test_one_that_was_given_up_comes_back_under_its_name_at_whichever_of_its_threads(opened):
    (one,) = opened(0)
    with Client(one._islands.meet, one.name) as client:
        for _ in range(20):
            client.ticket = one.ticket
            with suppress(NotAMember):
                client.leave()
            assert at_once(lambda one: one._rejoin(), [one] * 4) == [None] * 4
    one.tell(step=1)


def test_one_that_was_given_up_while_the_rendezvous_was_away_comes_back_with_its_question(opened, monkeypatch):
    (one,) = opened(0, ttl=30)  # no heartbeat gets ahead of the question
    join, failed = Client.join, []

    def first_lost(client, info=None):
        if not failed:
            failed.append(client)
            raise OSError("nobody answers")
        return join(client, info)

    monkeypatch.setattr(Client, "join", first_lost)
    one._ended.set()
    one._beats.join()
    one._ended.clear()
    with Client(one._islands.meet, one.name) as client:
        client.ticket = one.ticket
        client.leave()
    (met,) = average([one], {one.name: b"1"})
    assert failed and (met.kind, dict(met.payloads)) == ("applied", {one.name: b"1"})


def test_the_last_updates_of_islands_that_left_are_known_to_the_others_of_their_run(opened):
    one, other = opened(0, 1)
    other.tell_now(finished=True)
    other.leave()
    assert one.unfinished()
    one.tell_now(finished=True)
    assert not one.unfinished()
    with Client(one._islands.meet, "stranger") as client:
        assert client.ask("ended", run="two") == {"names": []}


def test_pairs_swap_and_a_partner_that_has_gone_leaves_one_alone(opened):
    islands = opened(0, 1, patience=0.5)
    pair = lambda key: lambda one: one.pair(key, one.name.encode(), update=4, seed=0)
    first, second = at_once(pair("meet 4"), islands)
    assert (dict(first.payloads), dict(second.payloads)) == ({"island-1": b"island-1"}, {"island-0": b"island-0"})
    alone = pair("meet 8")(islands[0])
    assert dict(alone.payloads) == {"island-0": b"island-0"} and "island-1" in alone.lost


def test_a_state_is_given_to_whoever_asks(opened):
    giver, taker = opened(0, 1)
    asked = threading.Thread(target=lambda: got.append(taker.state(taker._peers())))
    got, wanted = [], giver._office
    wanted._wanted = lambda key: threading.Thread(
        target=wanted.publish, args=(key, b"state"), kwargs={"ticket": giver.ticket}
    ).start()
    asked.start()
    asked.join()
    assert got == [b"state"]


def test_one_that_got_no_state_and_begins_with_the_others_is_awaited_like_them(opened):
    gone = opened.member(2, count=2)
    islands = [opened.member(number, count=2) for number in (0, 1)]
    assert islands[0].state([Peer(gone.name, gone.ticket, "127.0.0.1:9")]) is None
    gone.leave()
    assert all(first for first, _ in at_once(lambda one: one.enter(step=100, version="x"), islands))
    early = threading.Thread(target=lambda: mets.extend(average(islands[1:], letters(islands), update=103)))
    mets = []
    early.start()
    time.sleep(0.5)
    mets += average(islands[:1], letters(islands), update=103)
    early.join()
    assert [sorted(met.payloads) for met in mets] == 2 * [["island-0", "island-1"]]


def test_a_number_that_is_given_twice_ends_the_first_job(opened):
    (first,) = opened(0)
    opened.member(0)
    with pytest.raises(UserError, match=r"islands.number: another job is island-0 now"):
        for _ in range(100):
            first.tell(step=1)
            time.sleep(0.05)


def test_without_the_rendezvous_a_meeting_is_skipped_in_time():
    with ExitStack() as stack:
        with serve_rendezvous() as address:
            office = PayloadServer("island-0", fingerprint="one", description={}, settings=ServerSettings(1.0, 0.2, 1))
            stack.callback(office.close)
            islands = IslandsConfig(**QUICK | {"deadline": 1}, meet=address)
            group = IslandGroup(
                office, islands, address=f"127.0.0.1:{office.port}", find_problem=lambda name, payload: None
            )
            stack.callback(group.leave)
        began = time.monotonic()
        met = group.average("meet 3", b"x", update=3, history="")
        assert met.kind == "skipped" and "rendezvous" in met.failures and 1 < time.monotonic() - began < 8
        began = time.monotonic()  # it was waited for once
        assert group.average("meet 6", b"x", update=6, history="").kind == "skipped" and time.monotonic() - began < 0.5
