"""Rounds between islands: groups in threads, over real sockets, with payloads of a few bytes."""

import threading
from contextlib import ExitStack, suppress

import pytest
from support.waiting import HANG_SECONDS, wait_until

from meshwright.configs.errors import UserError
from meshwright.configs.sections.islands import IslandsConfig
from meshwright.parallel.transport.payload_server import PayloadServer, Peer, ServerSettings
from meshwright.train.core.rendezvous import Client, NotAMember
from meshwright.train.islands import island_group, quorum
from meshwright.train.islands.island_group import IslandGroup
from meshwright.train.launch.local_islands import serve_rendezvous

QUICK = {"patience": 2, "timeout": 2, "deadline": 5, "retries": 1, "ttl": 1, "gather": 5, "staleness": 9, "count": 3}


class Run:
    """A run on loopback: its rendezvous, and the payload servers of its islands. `run.start(0, 1, 2)` starts islands.

    `requested` is the keys that others asked for and that were not there.
    """

    def __init__(self, stack):
        self.stack, self.servers, self.requested = stack, {}, []
        self.rendezvous = stack.enter_context(ExitStack())
        self.address = self.rendezvous.enter_context(serve_rendezvous())

    def join(self, number, **changes):
        """One island, which has not begun."""
        name = f"island-{number}"
        server = PayloadServer(
            name, fingerprint="one", description={}, settings=ServerSettings(2.0, 0.2, 1),
            on_missing=self.requested.append,
        )  # fmt: skip
        self.stack.callback(server.close)
        self.servers[name] = server
        islands = IslandsConfig(**QUICK | changes, meet=self.address)
        problem = lambda name, payload: "not finite" if payload == b"nan" else None
        group = IslandGroup(server, islands, address=f"127.0.0.1:{server.port}", find_problem=problem)
        self.stack.callback(group.leave)
        return group

    def start(self, *numbers, **changes):
        groups = [self.join(number, **{"count": len(numbers)} | changes) for number in numbers]
        assert all(first for first, _ in at_once(lambda group: group.enter(step=0, version="x"), groups))
        return groups

    def peer(self, group):
        return Peer(group.name, group.ticket, f"127.0.0.1:{self.servers[group.name].port}")

    def wait_published(self, group, key):
        """Wait until `group` has published what it takes to a round."""
        reader = PayloadServer("reader", fingerprint="one", description={}, settings=ServerSettings())
        self.stack.callback(reader.close)
        payload = reader.collect(key, [self.peer(group)], deadline=HANG_SECONDS, patience=HANG_SECONDS)[group.name]
        assert isinstance(payload, bytes)


@pytest.fixture
def run():
    with ExitStack() as stack:
        yield Run(stack)


def at_once(work, members):
    """The results of `work(member)`, all run at the same time."""
    results = {}
    threads = [threading.Thread(target=lambda m=m: results.update({m.name: work(m)})) for m in members]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return [results[m.name] for m in members]


def average(members, payloads, key="meet 3", histories=None, update=3):
    histories = histories or {}

    def work(group):
        return group.average(key, payloads[group.name], update=update, history=histories.get(group.name, ""))

    return at_once(work, members)


def test_an_island_that_leaves_while_it_waits_does_not_rejoin(run):
    bounds = dict.fromkeys(("patience", "deadline", "ttl"), 2 * HANG_SECONDS)  # it does not merely expire
    one, other = run.start(0, 1, **bounds)
    waits = threading.Thread(target=lambda: average([one], {one.name: b"1"}), daemon=True)
    waits.start()
    run.wait_published(one, "meet 3")
    one.leave()
    waits.join(timeout=HANG_SECONDS)
    assert not waits.is_alive()
    wait_until(lambda: one.name not in other.peer_statuses())


def payloads_of(members):
    return {group.name: group.name.encode() for group in members}


def test_all_islands_get_the_same_payloads(run):
    islands = run.start(0, 1, 2)
    for result in average(islands, payloads_of(islands)):
        assert result.kind == "applied" and result.payloads == payloads_of(islands) and not result.failures


def test_a_payload_that_is_not_finite_is_excluded_and_its_island_is_behind(run):
    islands = run.start(0, 1, 2)
    payloads = payloads_of(islands) | {"island-1": b"nan"}
    first, bad, last = average(islands, payloads)
    assert first.kind == last.kind == "applied" and sorted(first.payloads) == ["island-0", "island-2"]
    assert first.failures == {"island-1": "not finite"} and first.payloads == last.payloads
    assert bad.kind == "behind" and [peer.name for peer in bad.sources] == ["island-0", "island-2"]


def test_an_island_with_an_older_history_is_behind(run):
    islands = run.start(0, 1, 2)
    results = average(islands, payloads_of(islands), histories={"island-0": "old"})
    assert [result.kind for result in results] == ["behind", "applied", "applied"] and "island-0" not in results[
        1
    ].payloads


def test_a_late_island_gets_the_payloads_of_the_others_unless_its_history_differs(run):
    islands = run.start(0, 1, 2, patience=0.5)
    early = average(islands[:2], payloads_of(islands))
    assert [result.kind for result in early] == ["applied", "applied"] and len(early[0].payloads) == 2
    (late,) = average(islands[2:], payloads_of(islands))
    assert late.kind == "applied" and late.payloads == early[0].payloads and "island-2" in late.failures
    (other,) = average(islands[2:], payloads_of(islands), histories={"island-2": "old"})
    assert other.kind == "behind" and len(other.sources) == 2


def test_a_decided_round_has_one_result_however_often_it_is_requested(run):
    islands = run.start(0, 1)
    once, again = average(islands, payloads_of(islands)), average(islands, payloads_of(islands))
    assert [dict(result.payloads) for result in once] == [dict(result.payloads) for result in again]


def test_a_round_of_long_ago_is_not_decided_again(run, monkeypatch):
    monkeypatch.setattr(quorum, "MAX_DECISIONS", 4)
    first, asleep = run.start(0, 1, patience=0.1)
    meet = lambda one, update: one.average(f"send-0 {update}", b"1", update=update, history="")
    swap = lambda one, update: one.pair(f"meet {update}", b"1", update=update, seed=0)
    for way in (meet, swap):
        assert [way(first, update).kind for update in range(3, 9)] == ["applied"] * 6
        late = way(asleep, 3)
        assert (late.kind, [peer.name for peer in late.sources]) == ("behind", ["island-0"])
    assert swap(asleep, 8).kind == "applied"  # the newest are remembered


def test_a_new_run_does_not_get_decisions_of_an_earlier_run(run, monkeypatch):
    monkeypatch.setattr(quorum, "MAX_DECISIONS", 4)
    earlier = run.start(0, 1)
    for update in range(3, 9):
        average(earlier, payloads_of(earlier), key=f"meet {update}", update=update)
    [one.leave() for one in earlier]
    islands = run.start(0, 1)
    for update in (3, 8):
        results = average(islands, payloads_of(islands), key=f"meet {update}", update=update)
        assert [(result.kind, result.payloads) for result in results] == [("applied", payloads_of(islands))] * 2


def test_an_expired_island_rejoins_once_from_several_threads(run):
    (one,) = run.start(0)
    with Client(run.address, one.name) as client:
        for _ in range(20):
            client.ticket = one.ticket
            with suppress(NotAMember):
                client.leave()
            assert at_once(lambda group: group.publish_status_now(step=1), [one] * 4) == [None] * 4
        assert [client.wait(beyond=-1, timeout=0.0)["members"][one.name]["ticket"]] == [one.ticket]


def test_an_expired_island_rejoins_and_repeats_its_request_after_the_rendezvous_was_away(run, monkeypatch):
    monkeypatch.setattr(island_group, "HEARTBEAT_SECONDS", HANG_SECONDS)
    (one,) = run.start(0, ttl=5 * HANG_SECONDS)  # no heartbeat gets ahead of the question
    join, failed = Client.join, []

    def first_lost(client, info=None):
        if not failed:
            failed.append(client)
            raise OSError("nobody answers")
        return join(client, info)

    monkeypatch.setattr(Client, "join", first_lost)
    with Client(run.address, one.name) as client:
        client.ticket = one.ticket
        client.leave()
    (result,) = average([one], {one.name: b"1"})
    assert failed and (result.kind, dict(result.payloads)) == ("applied", {one.name: b"1"})


def test_islands_that_finished_and_left_are_remembered_for_their_run(run):
    one, other = run.start(0, 1)
    other.publish_status_now(finished=True)
    other.leave()
    assert one.has_unfinished()
    one.publish_status_now(finished=True)
    assert not one.has_unfinished()
    with Client(run.address, "stranger") as client:
        assert client.ask("list-finished", run="two") == {"names": []}


def test_pairs_swap_payloads_and_without_a_partner_the_own_payload_is_used(run):
    islands = run.start(0, 1, patience=0.5)
    pair = lambda key: lambda one: one.pair(key, one.name.encode(), update=4, seed=0)
    first, second = at_once(pair("meet 4"), islands)
    assert (dict(first.payloads), dict(second.payloads)) == ({"island-1": b"island-1"}, {"island-0": b"island-0"})
    alone = pair("meet 8")(islands[0])
    assert dict(alone.payloads) == {"island-0": b"island-0"} and "island-1" in alone.failures


def test_a_requested_state_is_fetched(run):
    giver, taker = run.start(0, 1, patience=HANG_SECONDS, deadline=HANG_SECONDS)
    states = []
    fetching = threading.Thread(target=lambda: states.append(taker.fetch_state([run.peer(giver)])))
    fetching.start()
    key = wait_until(lambda: run.requested)[0]
    run.servers[giver.name].publish(key, b"state", ticket=giver.ticket)
    fetching.join()
    assert states == [b"state"]


def test_an_island_that_got_no_state_and_starts_with_the_others_is_awaited(run):
    gone = run.join(2, count=2)
    islands = [run.join(number, count=2, patience=HANG_SECONDS) for number in (0, 1)]
    assert islands[0].fetch_state([Peer(gone.name, gone.ticket, "127.0.0.1:9")]) is None
    gone.leave()
    assert all(first for first, _ in at_once(lambda one: one.enter(step=100, version="x"), islands))
    early = threading.Thread(target=lambda: results.extend(average(islands[1:], payloads_of(islands), update=103)))
    results = []
    early.start()
    run.wait_published(islands[1], "meet 3")
    results += average(islands[:1], payloads_of(islands), update=103)
    early.join()
    assert [sorted(result.payloads) for result in results] == 2 * [["island-0", "island-1"]]


def test_a_second_job_with_the_same_number_ends_the_first(run):
    (first,) = run.start(0)
    run.join(0)
    with pytest.raises(UserError, match=r"islands\.number: .*island-0"):
        wait_until(lambda: first.publish_status(step=1))


def test_without_the_rendezvous_a_round_is_skipped_and_only_the_first_one_waits(run, monkeypatch):
    (group,) = run.start(0, deadline=1)
    run.rendezvous.close()
    attempts, heartbeat = [], Client.heartbeat

    def count_attempts(client, info):
        if threading.current_thread() is threading.main_thread():
            attempts.append(client)
        return heartbeat(client, info)

    monkeypatch.setattr(Client, "heartbeat", count_attempts)
    monkeypatch.setattr(island_group, "RETRY_SECONDS", 0.01)
    for update, waits in ((3, True), (6, False)):
        result = group.average(f"meet {update}", b"x", update=update, history="")
        assert result.kind == "skipped" and "rendezvous" in result.failures
        assert (len(attempts) > 1) == waits
        attempts.clear()
