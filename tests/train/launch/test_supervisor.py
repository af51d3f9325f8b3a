"""The supervisor's decisions, pure, and its loop against an engine and a clock of the test's."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from meshwright.configs.errors import MeshwrightError, Preempted
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.train.core.event_log import read_events
from meshwright.train.core.fence import Fence, Fenced, current_epoch
from meshwright.train.core.heartbeat import CORRUPT_PHASE
from meshwright.train.core.rendezvous import MembershipStore, join_member
from meshwright.train.launch.drain import drain
from meshwright.train.launch.mesh_options import Formation
from meshwright.train.launch.restart_policies import (
    Failure,
    Report,
    culprit,
    gives_up,
    patience,
    pause,
    struck,
    suspect,
)
from meshwright.train.launch.supervisor import Watch, hung, judged, supervise, write

SETTINGS = ElasticConfig(
    restarts=2, window=100.0, backoff=1.0, hang_factor=10.0, hang_floor=5.0, start_timeout=60, grace=8,
    replace=20.0, settle=5.0,
)  # fmt: skip


def failures(*pairs):
    return [Failure(time, reached) for time, reached in pairs]


def test_giving_up_counts_failures_of_the_window():
    seen = failures((0.0, 1), (50.0, 2), (60.0, 3))
    assert gives_up(seen, SETTINGS, now=61.0) and not gives_up(seen, SETTINGS, now=101.0)
    assert not gives_up(seen[:2], SETTINGS, now=61.0)


PAUSES = {
    "the first": ([(0.0, 5)], 1.0),
    "no progress since": ([(0.0, 5), (1.0, 5)], 2.0),
    "none twice": ([(0.0, 5), (1.0, 5), (2.0, 4)], 4.0),
    "progress in between": ([(0.0, 5), (1.0, 5), (2.0, 9)], 1.0),
    "never above a minute": ([(float(n), 0) for n in range(20)], 60.0),
}


@pytest.mark.parametrize(("seen", "seconds"), PAUSES.values(), ids=PAUSES)
def test_the_pause_doubles_while_nothing_is_reached(seen, seconds):
    assert pause(failures(*seen), SETTINGS) == seconds


def test_patience_is_a_multiple_of_the_median_step_above_a_floor():
    assert patience([], SETTINGS) == 60.0
    assert patience([0.1, 0.1, 30.0], SETTINGS) == 5.0
    assert patience([2.0, 3.0, 4.0], SETTINGS) == 30.0


SUSPECTS = {
    "never heard of": ({0: (4, 9.0), 2: (4, 9.0)}, 1),
    "the lowest step": ({0: (5, 1.0), 1: (4, 9.0), 2: (5, 2.0)}, 1),
    "the oldest heartbeat": ({0: (4, 9.0), 1: (4, 3.0), 2: (4, 9.0)}, 1),
}


@pytest.mark.parametrize(("seen", "who"), SUSPECTS.values(), ids=SUSPECTS)
def test_the_suspect_is_the_one_the_others_wait_for(seen, who):
    reports = {number: Report(step, "step", 0.0, heard) for number, (step, heard) in seen.items()}
    assert suspect(reports, processes=3) == who


def test_the_culprit_was_killed_and_its_peers_raised_or_aborted():
    assert culprit({0: 1, 2: -9, 3: -6}) == 2 and culprit({0: 1, 3: -6}) == 3 and culprit({4: 1, 1: 1}) == 1


def test_a_slot_is_struck_out_by_failures_of_the_window():
    seen = [Failure(time, 1, slot) for time, slot in ((0.0, 0), (50.0, 1), (60.0, 1), (70.0, None), (80.0, None))]
    assert struck(seen, SETTINGS, now=90.0) == {1} and not struck(seen, SETTINGS, now=155.0)
    assert not struck(seen, SETTINGS.model_copy(update={"strikes": 0}), now=90.0)


def test_who_was_killed_is_the_suspect_not_who_then_missed_it():
    outcome = judged({0: 1, 1: -9, 2: None}, Watch(0.0), now=1.0)
    assert outcome.suspect == 1


def test_whose_device_was_found_out_is_the_suspect_not_who_ended_with_it():
    reports = {0: Report(9, "save or evaluate", 1.0, 1.0), 1: Report(9, CORRUPT_PHASE, 1.0, 1.0)}
    assert judged({0: 1, 1: 1}, Watch(0.0, reports=reports), now=2.0).suspect == 1


def test_a_journal_that_takes_no_line_does_not_hide_what_happened(tmp_path, caplog):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "events.jsonl").mkdir()
    write(tmp_path, "restart", reason="process 1 hangs")
    assert "process 1 hangs" in caplog.text


def test_programs_compiled_behind_the_last_step_have_the_time_of_a_start():
    watch = Watch(0.0, durations=[0.1] * 9)
    for phase, hangs in (("measure", False), ("step", True)):
        watch.reports = {number: Report(9, phase, 1.0, 1.0) for number in (0, 1)}
        outcome = hung([0, 1], SimpleNamespace(processes=2), watch, settings=SETTINGS, now=30.0)
        assert (outcome is not None) is hangs, phase
    watch.reports = {0: Report(9, "measure", 1.0, 1.0)}
    assert hung([0], SimpleNamespace(processes=1), watch, settings=SETTINGS, now=90.0).kind == "failed"


def test_who_was_asked_to_stop_while_it_started_has_not_failed():
    codes = {0: -15, 1: 75, 2: 143}
    assert judged(codes, Watch(0.0), now=1.0, asked=True).kind == "preempted"
    assert judged(codes, Watch(0.0), now=1.0).kind == "failed"
    assert judged({0: -15, 1: None}, Watch(0.0), now=1.0, asked=True) is None, "the other one still saves"


def test_a_later_epoch_shuts_the_fence(tmp_path):
    old, new, nobody = Fence(tmp_path, 1), Fence(tmp_path, 2), Fence(tmp_path, None)
    old.claim()
    old.check()
    new.claim()
    with pytest.raises(Fenced, match=r"epoch 2; .* epoch 1"):
        old.check()
    with pytest.raises(Fenced):
        old.claim()
    nobody.check()
    nobody.claim()
    assert nobody.epoch == current_epoch(tmp_path) == 3


@dataclass
class World:
    """An engine and a clock: in each epoch a list of (second, process, exit code or step)."""

    epochs: list
    now: float = 0.0
    room: MembershipStore = None
    stop: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(asked=False))
    processes: int = 2
    room_for: int = 2  # slots there are, at most
    lost: dict = field(default_factory=dict)  # slot -> (from, to) seconds
    formations: tuple = ()
    settings: ElasticConfig = SETTINGS
    log: list = field(default_factory=list)

    def __post_init__(self):
        self.room, self.teams = MembershipStore(lambda: self.now), []

    def slots(self):
        gone = [slot for slot, times in self.lost.items() if any(start <= self.now < end for start, end in times)]
        return [slot for slot in range(self.room_for) if slot not in gone]

    def start(self, epoch, *, slots, words):
        self.processes, self.words = len(slots), words
        self.began, self.epoch, self.codes = self.now, epoch, {}
        self.log.append(("start", round(self.now)))
        self.teams.append((tuple(slots), *words))

    def poll(self, number):
        for second, process, word in self.epochs[self.epoch - 1]:
            if self.now - self.began >= second and process == number:
                if word == "stop":
                    self.stop.asked = True
                elif isinstance(word, str):
                    info = {"step": int(word), "phase": "step", "beats": int(word)}
                    self.room.change(
                        lambda m, now: join_member(m, f"{self.epoch}/{number}", now=now, ttl=1e9, info=info)
                    )  # noqa: B023
                else:
                    self.codes[number] = word
        return self.codes.get(number)

    def broken(self):
        return None

    def ask_to_stop(self):
        self.log.append(("ask", round(self.now)))

    def kill(self):
        self.log.append(("kill", round(self.now)))

    def sleep(self, seconds):
        self.now += max(seconds, 0.01)

    def run(self, directory):
        supervise(self, settings=self.settings, directory=directory / "run", room=self.room, stop=self.stop,
                  formations=self.formations, clock=lambda: self.now, sleep=self.sleep)  # fmt: skip
        return self.log


def steps(process, *pairs):
    return [(second, process, str(step)) for second, step in pairs]


WELL = [(3.0, 0, 0), (4.0, 1, 0)]


def test_all_that_end_well_are_done(tmp_path):
    assert World([WELL]).run(tmp_path) == [("start", 0), ("kill", 4)]


def test_a_failure_kills_all_at_once_and_pauses(tmp_path):
    assert World([[(2.0, 1, -9)], WELL]).run(tmp_path)[:3] == [("start", 0), ("kill", 2), ("start", 3)]


def test_a_slow_start_is_not_a_hang_and_a_slow_step_is(tmp_path):
    """59 s to the first step are fine; then steps take 1 s, and 10 s without one are not."""
    slow = [*steps(0, (59, 1), (60, 2), (61, 3)), *steps(1, (59, 1), (60, 2))]
    log = World([slow, WELL]).run(tmp_path)
    assert log[1][0] == "kill" and 70 <= log[1][1] <= 71


def test_a_process_that_never_starts_is_a_hang(tmp_path):
    assert World([steps(0, (1, 1)), WELL]).run(tmp_path)[1] == ("kill", 60)


def test_a_request_has_its_grace_and_no_restart(tmp_path):
    asked = [(2.0, 0, "stop"), (5.0, 0, 75), (6.0, 1, 75)]
    world = World([asked])
    with pytest.raises(Preempted):
        world.run(tmp_path)
    assert world.log == [("start", 0), ("ask", 2), ("kill", 6)]
    deaf = World([[(2.0, 0, "stop")]])
    with pytest.raises(MeshwrightError, match=r"processes \[0, 1\] did not stop when asked, within 8 s"):
        deaf.run(tmp_path)
    assert deaf.log == [("start", 0), ("ask", 2), ("kill", 10)]


def test_a_process_preempted_by_others_is_started_again_without_counting(tmp_path):
    preempted = [(1.0, 0, 75), (1.0, 1, 75)]
    assert [word for word, _ in World([preempted] * 4 + [WELL]).run(tmp_path)].count("start") == 5


def test_one_that_stays_behind_when_all_others_have_ended_is_killed(tmp_path):
    assert World([[(1.0, 0, 0)], WELL]).run(tmp_path)[1] == ("kill", 9)


ALL, HALF = Formation(4, "data 4"), Formation(2, "data 2", ("mesh={data: 2}",))
DIES = [(2.0, 1, -9)]


def elastic(epochs, **changes):
    return World(epochs, processes=4, room_for=4, formations=(ALL, HALF), **changes)


def test_a_lost_slot_that_is_replaced_in_time_changes_nothing(tmp_path):
    world = elastic([DIES, [(3.0, number, 0) for number in range(4)]], lost={1: [(2.0, 12.0)]})
    assert world.run(tmp_path)[2] == ("start", 12)
    assert world.teams == [((0, 1, 2, 3),)] * 2


def test_a_lost_slot_without_replacement_leaves_fewer_and_comes_back(tmp_path):
    """Lost at 2, waited for until 23; back at 50, settled at 55, asked to stop, gone at 56: 4 processes again."""
    alone = [*steps(0, (1, 1), (2, 2)), *steps(1, (1, 1), (2, 2)), (33.0, 0, 75), (33.0, 1, 75)]
    slow = SETTINGS.model_copy(update={"hang_floor": 60.0})
    world = elastic([DIES, alone, [(3.0, n, 0) for n in range(4)]], lost={1: [(2.0, 50.0)]}, settings=slow)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    log = world.run(tmp_path)
    assert [pair for pair in log if pair[0] != "kill"] == [("start", 0), ("start", 23), ("ask", 55), ("start", 56)]
    assert world.teams == [((0, 1, 2, 3),), ((0, 2), "mesh={data: 2}"), ((0, 1, 2, 3),)]
    told = read_events(tmp_path / "run")
    assert [event["event"] for event in told] == ["restart", "shrink", "regroup", "grow"]
    assert told[1]["slots"] == [0, 2] and round(told[1]["waited_seconds"]) == 20
    assert told[2]["reason"] == "4 processes fit again, on data 4"


def test_a_drained_slot_is_not_waited_for(tmp_path):
    world = elastic([WELL])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    drain(tmp_path / "run", [1])
    world.run(tmp_path)
    assert world.log[0] == ("start", 0) and world.teams[0] == ((0, 2), "mesh={data: 2}")


def test_a_slot_that_comes_and_goes_disturbs_nobody_until_it_stays(tmp_path):
    """Lost at 2, two go on at 23; it is there from 30 to 33 and from 35 to 38, never for 5 s; from 50 on it stays."""
    alone = [*steps(0, (1, 1), (2, 2)), *steps(1, (1, 1), (2, 2)), (33.0, 0, 75), (33.0, 1, 75)]
    slow = SETTINGS.model_copy(update={"hang_floor": 60.0})
    flaps = {1: [(2.0, 30.0), (33.0, 35.0), (38.0, 50.0)]}
    world = elastic([DIES, alone, [(3.0, n, 0) for n in range(4)]], lost=flaps, settings=slow)
    assert [pair for pair in world.run(tmp_path) if pair[0] == "ask"] == [("ask", 55)]


def test_a_slot_that_is_back_while_others_are_waited_for_is_taken_at_once(tmp_path):
    """Two are lost at 2; one is back at 8, the other at 15: all four start, and nobody computes with fewer."""
    world = elastic([DIES, [(3.0, n, 0) for n in range(4)]], lost={1: [(2.0, 8.0)], 2: [(2.0, 15.0)]})
    assert world.run(tmp_path)[2] == ("start", 15) and world.teams == [((0, 1, 2, 3),)] * 2


def test_a_drained_slot_is_not_used_where_there_is_a_spare(tmp_path):
    """Five slots for four processes: the same mesh, in other slots."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    drain(tmp_path / "run", [2])
    world = World([[(3.0, n, 0) for n in range(4)]], processes=4, room_for=5, formations=(ALL, HALF))
    world.run(tmp_path)
    assert world.teams == [((0, 1, 3, 4),)]


def test_a_slot_that_fails_again_and_again_is_left_out(tmp_path):
    world = elastic([DIES, DIES, WELL])
    world.run(tmp_path)
    assert world.teams == [((0, 1, 2, 3),), ((0, 1, 2, 3),), ((0, 2), "mesh={data: 2}")]


def test_nothing_that_fits_is_an_error_that_says_what_is_left(tmp_path):
    world = elastic([DIES], lost={slot: [(2.0, 1e9)] for slot in (0, 1, 2)})
    with pytest.raises(MeshwrightError, match=r"slots \[3\] are left, \[\] are drained, and no mesh fits"):
        world.run(tmp_path)
