"""The supervisor's decisions, pure, and its loop against an engine and a clock of the test's."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from meshwright.configs.errors import MeshwrightError, Preemption
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.train.core.event_log import read_events
from meshwright.train.core.fence import Fence, FencedOutError, current_epoch
from meshwright.train.core.heartbeat import CORRUPT_PHASE
from meshwright.train.core.rendezvous import MembershipStore, join_member
from meshwright.train.launch.drain import drain
from meshwright.train.launch.hang_detection import (
    EpochMonitor,
    ProcessReport,
    detect_hang,
    find_hanging_process,
    hang_timeout,
)
from meshwright.train.launch.mesh_options import MeshOption
from meshwright.train.launch.restart_policies import (
    Failure,
    find_failed_process,
    find_unreliable_slots,
    restart_delay,
    too_many_failures,
)
from meshwright.train.launch.supervisor import Supervisor, judge_exit_codes, record_event

SETTINGS = ElasticConfig(
    restarts=2, window=100.0, backoff=1.0, hang_factor=10.0, hang_floor=5.0, start_timeout=60, grace=8,
    replace=20.0, settle=5.0,
)  # fmt: skip


def failures(*pairs):
    return [Failure(time, step) for time, step in pairs]


def test_only_failures_within_the_window_count_towards_giving_up():
    recent = failures((0.0, 1), (50.0, 2), (60.0, 3))
    assert too_many_failures(recent, SETTINGS, now=61.0) and not too_many_failures(recent, SETTINGS, now=101.0)
    assert not too_many_failures(recent[:2], SETTINGS, now=61.0)


DELAYS = {
    "the first": ([(0.0, 5)], 1.0),
    "no progress since": ([(0.0, 5), (1.0, 5)], 2.0),
    "none twice": ([(0.0, 5), (1.0, 5), (2.0, 4)], 4.0),
    "progress in between": ([(0.0, 5), (1.0, 5), (2.0, 9)], 1.0),
    "never above a minute": ([(float(n), 0) for n in range(20)], 60.0),
}


@pytest.mark.parametrize(("pairs", "seconds"), DELAYS.values(), ids=DELAYS)
def test_the_restart_delay_doubles_while_there_is_no_progress(pairs, seconds):
    assert restart_delay(failures(*pairs), SETTINGS) == seconds


def test_the_hang_timeout_is_a_multiple_of_the_median_step_above_a_floor():
    assert hang_timeout([], SETTINGS) == 60.0
    assert hang_timeout([0.1, 0.1, 30.0], SETTINGS) == 5.0
    assert hang_timeout([2.0, 3.0, 4.0], SETTINGS) == 30.0


SUSPECTS = {
    "never heard of": ({0: (4, 9.0), 2: (4, 9.0)}, 1),
    "the lowest step": ({0: (5, 1.0), 1: (4, 9.0), 2: (5, 2.0)}, 1),
    "the oldest heartbeat": ({0: (4, 9.0), 1: (4, 3.0), 2: (4, 9.0)}, 1),
}


@pytest.mark.parametrize(("progress", "process"), SUSPECTS.values(), ids=SUSPECTS)
def test_the_hanging_process_is_the_one_that_the_others_wait_for(progress, process):
    reports = {index: ProcessReport(step, "step", 0.0, heartbeat) for index, (step, heartbeat) in progress.items()}
    assert find_hanging_process(reports, range(3)) == process


def test_the_failed_process_was_killed_and_its_peers_raised_or_aborted():
    assert (
        find_failed_process({0: 1, 2: -9, 3: -6}) == 2
        and find_failed_process({0: 1, 3: -6}) == 3
        and find_failed_process({4: 1, 1: 1}) == 1
    )


def test_a_slot_is_unreliable_after_failures_within_the_window():
    recent = [Failure(time, 1, slot) for time, slot in ((0.0, 0), (50.0, 1), (60.0, 1), (70.0, None), (80.0, None))]
    assert find_unreliable_slots(recent, SETTINGS, now=90.0) == {1} and not find_unreliable_slots(
        recent, SETTINGS, now=155.0
    )
    assert not find_unreliable_slots(recent, SETTINGS.model_copy(update={"strikes": 0}), now=90.0)


def test_a_killed_process_is_the_suspect_not_the_peer_that_then_failed():
    outcome = judge_exit_codes({0: 1, 1: -9, 2: None}, EpochMonitor(0.0), now=1.0)
    assert outcome.suspect == 1


def test_a_process_with_a_corrupt_device_is_the_suspect_not_its_peer():
    reports = {0: ProcessReport(9, "save or evaluate", 1.0, 1.0), 1: ProcessReport(9, CORRUPT_PHASE, 1.0, 1.0)}
    assert judge_exit_codes({0: 1, 1: 1}, EpochMonitor(0.0, reports=reports), now=2.0).suspect == 1


def test_an_event_is_logged_where_the_event_log_cannot_be_written(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "events.jsonl").mkdir()
    record_event(tmp_path, "restart", reason="process 1 hangs")
    assert "process 1 hangs" in caplog.text


def test_compiling_after_the_last_step_may_take_as_long_as_a_start():
    monitor = EpochMonitor(0.0, step_seconds=[0.1] * 9)
    for phase, hangs in (("measure", False), ("step", True)):
        monitor.reports = {index: ProcessReport(9, phase, 1.0, 1.0) for index in (0, 1)}
        outcome = detect_hang([0, 1], monitor, SETTINGS, now=30.0)
        assert (outcome is not None) is hangs, phase
    monitor.reports = {0: ProcessReport(9, "measure", 1.0, 1.0)}
    assert detect_hang([0], monitor, SETTINGS, now=90.0).kind == "failed"


def test_a_process_stopped_while_it_started_has_not_failed():
    codes = {0: -15, 1: 75, 2: 143}
    assert judge_exit_codes(codes, EpochMonitor(0.0), now=1.0, stopping=True).kind == "preempted"
    assert judge_exit_codes(codes, EpochMonitor(0.0), now=1.0).kind == "failed"
    assert judge_exit_codes({0: -15, 1: None}, EpochMonitor(0.0), now=1.0, stopping=True) is None, (
        "the other one still saves"
    )


def test_a_later_epoch_fences_earlier_ones(tmp_path):
    old, new, nobody = Fence(tmp_path, 1), Fence(tmp_path, 2), Fence(tmp_path, None)
    old.claim()
    old.check()
    new.claim()
    with pytest.raises(FencedOutError, match=r"epoch 2; .* epoch 1"):
        old.check()
    with pytest.raises(FencedOutError):
        old.claim()
    nobody.check()
    nobody.claim()
    assert nobody.epoch == current_epoch(tmp_path) == 3


@dataclass
class FakeEngine:
    """An engine and a clock. In each epoch: a list of (second, process, exit code, step as text, or "stop")."""

    epochs: list
    now: float = 0.0
    store: MembershipStore = None
    stop: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(requested=False))
    processes: int = 2
    slot_count: int = 2  # slots there are, at most
    lost_at: dict = field(default_factory=dict)  # slot -> [(from, to) seconds]
    mesh_options: tuple = ()
    settings: ElasticConfig = SETTINGS
    log: list = field(default_factory=list)

    def __post_init__(self):
        self.store, self.started = MembershipStore(lambda: self.now), []

    def available_slots(self):
        gone = [slot for slot, times in self.lost_at.items() if any(start <= self.now < end for start, end in times)]
        return [slot for slot in range(self.slot_count) if slot not in gone]

    def start(self, epoch, *, slots, overrides):
        self.processes = len(slots)
        self.began, self.epoch, self.codes = self.now, epoch, {}
        self.log.append(("start", round(self.now)))
        self.started.append((tuple(slots), *overrides))

    def poll(self, index):
        for second, process, event in self.epochs[self.epoch - 1]:
            if self.now - self.began >= second and process == index:
                if event == "stop":
                    self.stop.requested = True
                elif isinstance(event, str):
                    self.report(index, int(event))
                else:
                    self.codes[index] = event
        return self.codes.get(index)

    def report(self, index, step):
        name, info = f"{self.epoch}/{index}", {"step": step, "phase": "step", "beats": step}
        self.store.change(lambda members, now: join_member(members, name, now=now, ttl=1e9, info=info))

    def service_failure(self):
        return None

    def request_stop(self):
        self.log.append(("ask", round(self.now)))

    def kill(self):
        self.log.append(("kill", round(self.now)))

    def sleep(self, seconds):
        self.now += max(seconds, 0.01)

    def run(self, directory):
        Supervisor(
            self, self.settings, directory / "run", self.store, self.stop, self.mesh_options,
            clock=lambda: self.now, sleep=self.sleep,
        ).run()  # fmt: skip
        return self.log


def steps(process, *pairs):
    return [(second, process, str(step)) for second, step in pairs]


ALL_END_WELL = [(3.0, 0, 0), (4.0, 1, 0)]


def test_the_run_is_done_when_all_processes_end_well(tmp_path):
    assert FakeEngine([ALL_END_WELL]).run(tmp_path) == [("start", 0), ("kill", 4)]


def test_a_failure_kills_all_processes_and_delays_the_restart(tmp_path):
    assert FakeEngine([[(2.0, 1, -9)], ALL_END_WELL]).run(tmp_path)[:3] == [("start", 0), ("kill", 2), ("start", 3)]


def test_a_slow_start_is_no_hang_and_a_slow_step_is(tmp_path):
    """59 s to the first step are fine; then steps take 1 s, and 10 s without one are not."""
    slow = [*steps(0, (59, 1), (60, 2), (61, 3)), *steps(1, (59, 1), (60, 2))]
    log = FakeEngine([slow, ALL_END_WELL]).run(tmp_path)
    assert log[1][0] == "kill" and 70 <= log[1][1] <= 71


def test_a_process_that_never_starts_is_a_hang(tmp_path):
    assert FakeEngine([steps(0, (1, 1)), ALL_END_WELL]).run(tmp_path)[1] == ("kill", 60)


def test_processes_have_the_grace_period_to_stop_and_are_not_restarted(tmp_path):
    stops = [(2.0, 0, "stop"), (5.0, 0, 75), (6.0, 1, 75)]
    engine = FakeEngine([stops])
    with pytest.raises(Preemption):
        engine.run(tmp_path)
    assert engine.log == [("start", 0), ("ask", 2), ("kill", 6)]
    stuck = FakeEngine([[(2.0, 0, "stop")]])
    with pytest.raises(MeshwrightError, match=r"processes \[0, 1\] did not stop when asked, within 8 s"):
        stuck.run(tmp_path)
    assert stuck.log == [("start", 0), ("ask", 2), ("kill", 10)]


def test_preemptions_by_others_are_restarted_and_are_not_failures(tmp_path):
    preempted = [(1.0, 0, 75), (1.0, 1, 75)]
    assert [event for event, _ in FakeEngine([preempted] * 4 + [ALL_END_WELL]).run(tmp_path)].count("start") == 5


def test_a_process_that_does_not_end_after_the_others_is_killed(tmp_path):
    assert FakeEngine([[(1.0, 0, 0)], ALL_END_WELL]).run(tmp_path)[1] == ("kill", 9)


ALL, HALF = MeshOption(4, "data 4"), MeshOption(2, "data 2", ("mesh={data: 2}",))
ONE_DIES = [(2.0, 1, -9)]
TWO_GO_ON = [*steps(0, (1, 1), (2, 2)), *steps(1, (1, 1), (2, 2)), (33.0, 0, 75), (33.0, 1, 75)]
ALL_FOUR_END_WELL = [(3.0, index, 0) for index in range(4)]
PATIENT = SETTINGS.model_copy(update={"hang_floor": 60.0})


def make_run(directory):
    (directory / "run").mkdir()
    (directory / "run" / "config.yaml").touch()


def elastic_engine(epochs, **changes):
    return FakeEngine(epochs, processes=4, slot_count=4, mesh_options=(ALL, HALF), **changes)


def test_a_lost_slot_that_is_replaced_in_time_changes_nothing(tmp_path):
    engine = elastic_engine([ONE_DIES, ALL_FOUR_END_WELL], lost_at={1: [(2.0, 12.0)]})
    assert engine.run(tmp_path)[2] == ("start", 12)
    assert engine.started == [((0, 1, 2, 3),)] * 2


def test_a_lost_slot_shrinks_the_run_and_its_return_grows_it(tmp_path):
    """Lost at 2, waited for until 23; back at 50, settled at 55, asked to stop, gone at 56: 4 processes again."""
    engine = elastic_engine([ONE_DIES, TWO_GO_ON, ALL_FOUR_END_WELL], lost_at={1: [(2.0, 50.0)]}, settings=PATIENT)
    make_run(tmp_path)
    log = engine.run(tmp_path)
    assert [pair for pair in log if pair[0] != "kill"] == [("start", 0), ("start", 23), ("ask", 55), ("start", 56)]
    assert engine.started == [((0, 1, 2, 3),), ((0, 2), "mesh={data: 2}"), ((0, 1, 2, 3),)]
    events = read_events(tmp_path / "run")
    assert [event["event"] for event in events] == ["restart", "shrink", "regroup", "grow"]
    assert events[1]["slots"] == [0, 2] and round(events[1]["waited_seconds"]) == 20
    assert events[2]["reason"] == "4 processes fit again, on data 4"


def test_a_drained_slot_is_not_waited_for(tmp_path):
    engine = elastic_engine([ALL_END_WELL])
    make_run(tmp_path)
    drain(tmp_path / "run", [1])
    engine.run(tmp_path)
    assert engine.log[0] == ("start", 0) and engine.started[0] == ((0, 2), "mesh={data: 2}")


def test_a_slot_that_flaps_is_used_only_once_it_stays(tmp_path):
    """Lost at 2, two go on at 23; it is there from 30 to 33 and from 35 to 38, never for 5 s; from 50 on it stays."""
    flaps = {1: [(2.0, 30.0), (33.0, 35.0), (38.0, 50.0)]}
    engine = elastic_engine([ONE_DIES, TWO_GO_ON, ALL_FOUR_END_WELL], lost_at=flaps, settings=PATIENT)
    assert [pair for pair in engine.run(tmp_path) if pair[0] == "ask"] == [("ask", 55)]


def test_slots_that_return_at_different_times_are_all_waited_for(tmp_path):
    """Two are lost at 2; one is back at 8, the other at 15: all four start, and nobody computes with fewer."""
    engine = elastic_engine([ONE_DIES, ALL_FOUR_END_WELL], lost_at={1: [(2.0, 8.0)], 2: [(2.0, 15.0)]})
    assert engine.run(tmp_path)[2] == ("start", 15) and engine.started == [((0, 1, 2, 3),)] * 2


def test_a_drained_slot_is_not_used_where_there_is_a_spare(tmp_path):
    """Five slots for four processes: the same mesh, in other slots."""
    make_run(tmp_path)
    drain(tmp_path / "run", [2])
    engine = FakeEngine([ALL_FOUR_END_WELL], processes=4, slot_count=5, mesh_options=(ALL, HALF))
    engine.run(tmp_path)
    assert engine.started == [((0, 1, 3, 4),)]


def test_a_slot_that_fails_repeatedly_is_left_out(tmp_path):
    engine = elastic_engine([ONE_DIES, ONE_DIES, ALL_END_WELL])
    engine.run(tmp_path)
    assert engine.started == [((0, 1, 2, 3),), ((0, 1, 2, 3),), ((0, 2), "mesh={data: 2}")]


def test_slots_that_fit_no_mesh_are_an_error_that_names_them(tmp_path):
    engine = elastic_engine([ONE_DIES], lost_at={slot: [(2.0, 1e9)] for slot in (0, 1, 2)})
    with pytest.raises(MeshwrightError, match=r"slots \[3\] are left, \[\] are drained, and no mesh fits"):
        engine.run(tmp_path)
