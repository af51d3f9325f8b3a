"""Payloads between islands over real sockets: cut, damaged, of another run or another life, slow."""

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
def open_server():
    with contextlib.ExitStack() as stack:

        def open_server(name, *, fingerprint="same", settings=QUICK, **common):
            server = PayloadServer(name, fingerprint=fingerprint, description=common, settings=settings)
            stack.callback(server.close)
            return server

        yield open_server


@pytest.fixture
def faulty_relay():
    with contextlib.ExitStack() as stack:
        yield lambda server, faults: stack.enter_context(contextlib.closing(FaultyRelay(server.port, faults)))


def peer(server, ticket=1, port=None):
    return Peer(server.name, ticket, f"127.0.0.1:{port or server.port}")


def fetch(server, *peers, key="meet 3", **limits):
    return server.collect(key, peers, **{"deadline": 10.0, "patience": 1.0, **limits})


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


class FaultyRelay(threading.Thread):
    """A relay to `port` that cuts, or flips a bit in, the answers of its first connections, each at its position."""

    def __init__(self, port, faults):
        super().__init__(daemon=True)
        self.faults, self.target, self.relayed_bytes, self.relays = list(faults), port, 0, []
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

    def copy(self, source, target, kind, position):
        copied = 0
        with contextlib.suppress(OSError):
            while data := bytearray(source.recv(65536)):
                if kind == "cut" and copied + len(data) > position:
                    break
                if kind == "flip" and copied <= position < copied + len(data):
                    data[position - copied] ^= 4
                target.sendall(data)
                copied += len(data)
                self.relayed_bytes += len(data)
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


def test_a_cut_transfer_continues_after_the_last_complete_frame(open_server, faulty_relay):
    sender, receiver = open_server("island-0"), open_server("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=1)
    relay = faulty_relay(sender, [("cut", 1_000_000), ("cut", 1_500_000)])
    assert fetch(receiver, peer(sender, port=relay.port)) == {"island-0": PAYLOAD}
    assert receiver.counters.resumed == 2 and relay.relayed_bytes < len(PAYLOAD) * 1.2


@pytest.mark.parametrize("position", [20, 700_000], ids=["head", "data"])
def test_a_damaged_frame_is_refused_and_requested_again(open_server, faulty_relay, position):
    sender, receiver = open_server("island-0"), open_server("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=1)
    relay = faulty_relay(sender, [("flip", position)])
    assert fetch(receiver, peer(sender, port=relay.port)) == {"island-0": PAYLOAD}
    assert receiver.counters.corrupted == 1


def test_a_link_that_damages_everything_is_a_failure(open_server, faulty_relay):
    sender, receiver = open_server("island-0"), open_server("island-1", settings=QUICK._replace(retries=1))
    sender.publish("meet 3", PAYLOAD, ticket=1)
    relay = faulty_relay(sender, [("flip", 1000)] * 9)
    found = fetch(receiver, peer(sender, port=relay.port))["island-0"]
    assert isinstance(found, FetchFailure) and "checksum" in found.reason


def test_a_payload_for_one_reader_is_dropped_when_it_has_arrived_and_not_before(open_server, faulty_relay):
    """A state is large, and no other island requests it."""
    sender, receiver = open_server("island-0"), open_server("island-1")
    sender.publish("state island-1/7/0", PAYLOAD, ticket=1, reader="island-1")
    relay = faulty_relay(sender, [("cut", 1_000_000)])
    assert fetch(receiver, peer(sender, port=relay.port), key="state island-1/7/0") == {"island-0": PAYLOAD}
    found = fetch(receiver, peer(sender), key="state island-1/7/0")["island-0"]
    assert isinstance(found, FetchFailure) and "did not publish" in found.reason


def test_a_payload_under_way_is_counted_by_both_ends(open_server):
    link = StoppedLink(1_000_000)
    sender, receiver = open_server("island-0", settings=ServerSettings(throttle=link)), open_server("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=1)
    fetching = threading.Thread(target=lambda: fetch(receiver, peer(sender), deadline=60.0))
    fetching.start()
    received = wait_until(lambda: receiver.counters.received_bytes)
    assert received < len(PAYLOAD) and sender.active_sends == 1
    link.opened.set()
    fetching.join()
    assert receiver.counters.received_bytes == len(PAYLOAD)
    wait_until(lambda: sender.active_sends == 0)


def test_a_payload_of_another_life_of_the_sender_is_absent(open_server):
    sender, receiver = open_server("island-0"), open_server("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=2)
    assert isinstance(fetch(receiver, peer(sender, ticket=1))["island-0"], FetchFailure)


def test_a_payload_that_is_published_later_is_waited_for_within_the_patience(open_server):
    sender, receiver = open_server("island-0"), open_server("island-1")
    threading.Timer(0.3, sender.publish, ["meet 3", b"late"], {"ticket": 1}).start()
    assert fetch(receiver, peer(sender), patience=5.0) == {"island-0": b"late"}
    failure = fetch(receiver, peer(sender), key="meet 4", patience=0.3)["island-0"]
    assert "did not publish `meet 4` within 0.3 s" in failure.reason


def test_another_run_is_refused_and_its_different_settings_are_named(open_server):
    here, there = (
        open_server("island-0", steps=8, seed=0),
        open_server("island-1", fingerprint="other", steps=9, seed=0),
    )
    there.publish("meet 3", b"x", ticket=1)
    assert here.compare_settings(peer(there)) == {"steps": (9, 8)}
    assert fetch(here, peer(there))["island-1"].reason == "island-1 is of another run"


def test_bytes_are_counted_and_frames_cost_little(open_server):
    sender, receiver = open_server("island-0"), open_server("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=1)
    fetch(receiver, peer(sender))
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


def test_a_throttle_is_asked_for_every_byte_and_delays_each_answer_once(open_server):
    link = StoppedLink(float("inf"))
    sender, receiver = open_server("island-0", settings=QUICK._replace(throttle=link)), open_server("island-1")
    sender.publish("meet 3", PAYLOAD, ticket=1)
    fetch(receiver, peer(sender))
    assert (link.bytes, link.delays) == (sender.counters.sent_bytes, 1) and link.bytes > len(PAYLOAD)
