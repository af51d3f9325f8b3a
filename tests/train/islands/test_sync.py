"""What an island does while it waits for others: it says so, and it stops when asked to. Nothing is compiled here."""

import threading
from concurrent.futures import Future
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from support.waiting import HANG_SECONDS

from meshwright.configs.errors import Preemption
from meshwright.parallel.outer.interface import OuterStep
from meshwright.parallel.transport.payload_server import TransferCounters
from meshwright.train import loop as loops
from meshwright.train.core.event_log import EventLog, read_events
from meshwright.train.core.sample_log import SampleLog, read_sample_log
from meshwright.train.islands import agreed_wait
from meshwright.train.islands import sync as sync_module
from meshwright.train.islands.agreed_wait import CollectiveWait
from meshwright.train.islands.compiled_rounds import RoundPrograms
from meshwright.train.islands.sync import IslandSync, IslandTransport, StateReplaced
from meshwright.train.loop import Loop
from meshwright.train.preemption import StopRequest


class Group:
    """Of two islands; the other one trains and answers nothing until the test is over."""

    over = threading.Event()

    def has_unfinished(self):
        return True

    def publish_status(self, **info):
        pass

    publish_status_now = publish_status

    def enter(self, **info):
        self.over.wait()
        raise OSError("nobody answers")

    average = pair = lambda self, key, payload, **info: self.over.wait()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(agreed_wait, "REPORT_SECONDS", 0.01)
    monkeypatch.setattr(agreed_wait, "STOP_GRACE_SECONDS", 0.05)
    monkeypatch.setattr(Group, "over", threading.Event())
    yield
    Group.over.set()


def make_sync(directory, *, is_sending=lambda: False, patience=HANG_SECONDS, **callbacks):
    """The rounds of an island: one begins after every third update, and is used one update later."""
    outer_steps = [OuterStep("meet", 3, 1, None, "send"), OuterStep("send", 3, 0, None)]
    island = SimpleNamespace(outer=SimpleNamespace(outer_steps=outer_steps), to_canonical_order=lambda tree: tree)
    config = SimpleNamespace(
        outer=SimpleNamespace(name="diloco"),
        islands=SimpleNamespace(patience=patience, gather=HANG_SECONDS, deadline=HANG_SECONDS),
        seed=0,
    )
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    program = SimpleNamespace(
        replicas=island,
        config=config,
        traffic=[],
        mesh=mesh,
        eval_params=lambda state: state,
        shapes=None,
        shardings=None,
    )
    transport = IslandTransport(Group(), TransferCounters(), None, set(), is_sending)
    sync = IslandSync(program, transport, EventLog(directory), **callbacks)
    sync.traffic_metrics = lambda step: {}
    return sync


def test_each_sign_of_life_of_one_who_waits_is_news_though_nothing_arrives(tmp_path, quick, monkeypatch):
    """A supervisor takes what it has heard already for a hang."""
    seconds = iter(range(1000))
    for module in (sync_module, agreed_wait):
        clock = SimpleNamespace(monotonic=lambda: float(next(seconds)), sleep=lambda seconds: None)
        monkeypatch.setattr(module, "time", clock)
    future, heard = Future(), []

    def alive(phase):
        heard.append(phase)
        if len(heard) == 4:
            future.set_result("payload")

    assert CollectiveWait(alive, lambda: False).result(future, "meet") == "payload"
    assert len(set(heard)) == 4
    heard.clear()
    make_sync(tmp_path, report_waiting=heard.append, patience=9.0).finish({}, 7)
    assert len(set(heard)) == len(heard) > 2


def test_one_who_is_asked_to_stop_gives_a_round_up_and_keeps_its_state(tmp_path, quick, monkeypatch):
    programs = RoundPrograms(lambda params, outer: [], None, [], [], [])
    monkeypatch.setattr(sync_module, "make_round_programs", lambda *_: programs)
    asked = []
    sync = make_sync(tmp_path, should_stop=lambda update: asked.append(update) or len(asked) > 2)
    state = SimpleNamespace(params={}, outer={})
    assert sync(state, 3) is state and not asked, "training goes on while the round is under way"
    assert sync.drain(state) is state
    assert [(event["event"], event["lost"]) for event in read_events(tmp_path)] == [
        ("meeting-skipped", {"all": "asked to stop"})
    ]


def test_one_who_is_asked_to_stop_before_the_others_are_there_is_preempted(tmp_path, quick):
    with pytest.raises(Preemption):
        make_sync(tmp_path, should_stop=lambda update: True).begin({"w": jax.numpy.zeros(2)}, 0)


def test_one_who_is_asked_to_stop_at_the_end_waits_for_nobody(tmp_path):
    waits = []
    make_sync(tmp_path, should_stop=lambda update: True, report_waiting=waits.append).finish({}, 7)
    assert not waits


def test_one_who_has_finished_stays_until_a_state_that_it_gives_has_arrived(tmp_path):
    sending = iter([True, True, True])
    make_sync(tmp_path, patience=0.0, is_sending=lambda: next(sending, False)).finish({}, 7)
    assert next(sending, None) is None


def test_several_processes_stop_at_one_question_and_for_good(monkeypatch):
    """JAX says yes to one question only; the questions are numbered, whatever step they are asked after."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda number: number == 3)
    stop = StopRequest()
    assert [stop.should_stop(step) for step in (7, 7, 7, 9, 10)] == [False, False, True, True, True]


def test_updates_made_before_an_island_took_anothers_state_are_told_and_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "make_global_arrays", lambda rows, config, mesh: rows)
    config = SimpleNamespace(steps=5, logging=SimpleNamespace(profile=SimpleNamespace(start=0, steps=0), on_nan="stop"))
    sample_log, order = SampleLog(tmp_path, epoch=1, process=0, processes=1, enabled=True), []
    nothing = lambda *words: None
    quiet = SimpleNamespace(set_activity=nothing, report=nothing, poll=nothing, restart=nothing)

    def synchronize(state, step):
        order.append(f"synchronize {step}")
        if step == 3:
            raise StateReplaced(state, 4)
        return state

    class FakeLoop(Loop):
        def __init__(self):
            self.program, self.directory, self.sample_log = (
                SimpleNamespace(config=config, mesh=None),
                tmp_path,
                sample_log,
            )
            self.progress = self.checkpointer = self.checkpoint_schedule = quiet
            self.shard, self.meter = (
                SimpleNamespace(first_sample=lambda step: step),
                SimpleNamespace(host=lambda: threading.Lock()),
            )
            self.train_step, self.synchronize = lambda state, batch: (state, {}), synchronize
            self.island_sync, self.stop_request = None, SimpleNamespace(should_stop=lambda step: False)

        def batches(self, start):
            for number in range(start, 5):
                yield {"tokens": np.full((1, 2), number), "targets": np.full((1, 2), number)}

        def needs_pause(self, step):
            return False

        def log_step(self, pending):
            if pending is not None:
                self.sample_log.record_update(pending[0])
                order.append(pending[0])

    FakeLoop().run_to_end("state", 0)
    # The metrics of a step are read before the next synchronization: time spent there belongs to the next step.
    assert order == ["synchronize 1", 1, "synchronize 2", 2, "synchronize 3", 3, "synchronize 5", 5]
    assert [line.get("step", -1) for line in read_sample_log(tmp_path)[0]] == [-1, 1, 2, 3, -1, 5]


def test_an_island_that_goes_back_takes_its_checkpoints_and_notes_along(tmp_path):
    rewinds, sessions = [], []
    others = SimpleNamespace(begin=lambda state, step: ("theirs", 2), finish=lambda state, step: None)
    checkpointer = SimpleNamespace(
        rewind=lambda state, step, samples: rewinds.append((state, step, samples)),
        save_final=lambda *state, samples: None,
        storage=SimpleNamespace(steps=[]),
    )

    class FakeLoop(Loop):
        def __init__(self):
            self.program = SimpleNamespace(config=SimpleNamespace(steps=5, data=SimpleNamespace(global_batch=4)))
            self.evaluator, self.island_sync, self.checkpointer = None, others, checkpointer
            self.data, self.data_from = "annotated from 4", lambda step: f"annotated from {step}"
            self.progress = SimpleNamespace(report=lambda step, phase: None)

        def run_steps(self, state, start):
            sessions.append((self.data, start))
            return state

    assert FakeLoop().run("own", 4) == "theirs"
    assert rewinds == [("theirs", 2, 8)] and sessions == [("annotated from 2", 2)]
