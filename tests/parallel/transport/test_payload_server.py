"""Payloads between islands, over real sockets: cut, damaged, of another run, of another life, slow."""

import asyncio
import contextlib
import socket
import threading

import numpy as np
import pytest
from support.waiting import wait_until

from meshwright.parallel.transport.payload_server import FetchFailure, PayloadServer, Peer, ServerSettings
from meshwright.parallel.transport.throttle import Throttle

PAYLOAD = np.random.default_rng(0).bytes(3_000_000)
QUICK = ServerSettings(timeout=2.0, wait_seconds=0.2, retries=3)


@pytest.fixture
def opened():
    with contextlib.ExitStack() as stack:

        def office(name, *, fingerprint="same", settings=QUICK, **common):
            made = PayloadServer(name, fingerprint=fingerprint, description=common, settings=settings)
            stack.callback(made.close)
            return made

        yield office


@pytest.fixture
def bad_link():
    with contextlib.ExitStack() as stack:
        yield lambda office, faults: stack.enter_context(contextlib.closing(Bad(office.port, faults)))


def peer(office, ticket=1, port=None):
    return Peer(office.name, ticket, f"127.0.0.1:{port or office.port}")


def fetched(office, *peers, key="meet 3", **limits):
    return office.collect(key, peers, **{"deadline": 10.0, "patience": 1.0, **limits})


class StoppedLink(Throttle):
    """Carries `limit` bytes, and the rest once it is `opened`; counts bytes and delays."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.opened, self.bytes, self.delays = limit, threading.Event(), 0, 0

    async def wait_latency(self):
        self.delays += 1

    async def wait_to_send(self, size):
        self.bytes += size
        while self.bytes > self.limit and not self.opened.is_set():
            await asyncio.sleep(0.01)


class Bad(threading.Thread):
    """A relay to `port` that cuts, or flips a bit of, the answer of its first connections, each at its place."""

    def __init__(self, port, faults):
        super().__init__(daemon=True)
        self.faults, self.target, self.carried, self.relays = list(faults), port, 0, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                fault = self.faults.pop(0) if self.faults else (None, 0)
                pair = [threading.Thread(target=self.copy, args=(near, far, None, 0)),
                        threading.Thread(target=self.copy, args=(far, near, *fault))]  # fmt: skip
                self.relays.append((near, far, pair))
                for thread in pair:
                    thread.start()

    def copy(self, source, target, kind, place):
        seen = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(65536)):
                if kind == "cut" and seen + len(data) > place:
                    break
                if kind == "flip" and seen <= place < seen + len(data):
                    data[place - seen] ^= 4
                target.sendall(data)
                seen += len(data)
                self.carried += len(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.join()
        self.listener.close()
        for near, far, pair in self.relays:
            for thread in pair:
                thread.join()
            near.close(), far.close()


def test_a_transfer_that_was_cut_goes_on_from_the_last_whole_frame(opened, bad_link):
    sender, receiver = opened("island-0"), opened("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=1)
    bad = bad_link(sender, [("cut", 1_000_000), ("cut", 1_500_000)])
    assert fetched(receiver, peer(sender, port=bad.port)) == {"island-0": PAYLOAD}
    assert receiver.counters.resumed == 2 and bad.carried < len(PAYLOAD) * 1.2


@pytest.mark.parametrize("place", [20, 700_000], ids=["head", "data"])
def test_a_damaged_frame_is_refused_and_asked_for_again(opened, bad_link, place):
    sender, receiver = opened("island-0"), opened("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=1)
    bad = bad_link(sender, [("flip", place)])
    assert fetched(receiver, peer(sender, port=bad.port)) == {"island-0": PAYLOAD}
    assert receiver.counters.corrupted == 1


def test_a_link_that_damages_everything_is_given_up(opened, bad_link):
    sender, receiver = opened("island-0"), opened("island-1", settings=QUICK._replace(retries=1))
    sender.publish("meet 3", PAYLOAD, ticket=1)
    bad = bad_link(sender, [("flip", 1000)] * 9)
    found = fetched(receiver, peer(sender, port=bad.port))["island-0"]
    assert isinstance(found, FetchFailure) and "checksum" in found.reason


def test_what_is_for_one_goes_when_that_one_has_it_and_not_before(opened, bad_link):
    """A state is as large as a run; nobody else asks for it."""
    sender, receiver = opened("island-0"), opened("island-1")
    sender.publish("state island-1/7/0", PAYLOAD, ticket=1, reader="island-1")
    bad = bad_link(sender, [("cut", 1_000_000)])
    assert fetched(receiver, peer(sender, port=bad.port), key="state island-1/7/0") == {"island-0": PAYLOAD}
    found = fetched(receiver, peer(sender), key="state island-1/7/0")["island-0"]
    assert isinstance(found, FetchFailure) and "nothing to give" in found.reason


def test_a_payload_under_way_is_counted_by_both_ends(opened):
    link = StoppedLink(1_000_000)
    sender, receiver = opened("island-0", settings=ServerSettings(throttle=link)), opened("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=1)
    fetching = threading.Thread(target=lambda: fetched(receiver, peer(sender), deadline=60.0))
    fetching.start()
    received = wait_until(lambda: receiver.counters.received_bytes)
    assert received < len(PAYLOAD) and sender.active_sends == 1
    link.opened.set()
    fetching.join()
    assert receiver.counters.received_bytes == len(PAYLOAD)
    wait_until(lambda: sender.active_sends == 0)


def test_another_life_of_the_sender_has_nothing_under_that_key(opened):
    sender, receiver = opened("island-0"), opened("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=2)
    assert isinstance(fetched(receiver, peer(sender, ticket=1))["island-0"], FetchFailure)


def test_what_is_published_later_is_waited_for_and_what_never_is_is_not(opened):
    sender, receiver = opened("island-0"), opened("island-1")
    threading.Timer(0.3, sender.publish, ["meet 3", b"late"], {"ticket": 1}).start()
    assert fetched(receiver, peer(sender), patience=5.0) == {"island-0": b"late"}
    failure = fetched(receiver, peer(sender), key="meet 4", patience=0.3)["island-0"]
    assert "nothing to give within 0.3 s" in failure.reason


def test_another_run_is_refused_and_told_apart_by_key(opened):
    here, there = opened("island-0", steps=8, seed=0), opened("island-1", fingerprint="other", steps=9, seed=0)
    there.publish("meet 3", b"x", ticket=1)
    assert here.compare_settings(peer(there)) == {"steps": (9, 8)}
    assert fetched(here, peer(there))["island-1"].reason == "island-1 is of another run"


def test_bytes_are_counted_and_frames_cost_little(opened):
    sender, receiver = opened("island-0"), opened("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=1)
    fetched(receiver, peer(sender))
    assert len(PAYLOAD) < sender.counters.by_kind["meet"] < 1.001 * len(PAYLOAD)


def test_a_token_bucket_lets_its_rate_through_and_no_more():
    now = [0.0]
    link = Throttle(bandwidth=8000, clock=lambda: now[0])  # 1000 bytes a second, a burst of 50
    assert link.charge(50) == pytest.approx(0)
    assert link.charge(1000) == pytest.approx(1.0)
    now[0] = 0.5
    assert link.charge(1000) == pytest.approx(1.5)
    now[0] = 60.0
    assert link.charge(50) == pytest.approx(0)  # what was not used is not saved up


def test_a_throttle_is_asked_for_every_byte_and_delays_each_answer_once(opened):
    link = StoppedLink(float("inf"))
    sender, receiver = opened("island-0", settings=QUICK._replace(throttle=link)), opened("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=1)
    fetched(receiver, peer(sender))
    assert (link.bytes, link.delays) == (sender.counters.sent_bytes, 1) and link.bytes > len(PAYLOAD)
