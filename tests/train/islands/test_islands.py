"""Islands as real jobs on loopback end with the parameters of replicas on one mesh, and survive failures."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from support.equivalence import TINY
from support.run_files import losses, metric_rows
from support.waiting import HANG_SECONDS, wait_until

from meshwright.configs.loader import dump_yaml, merge_trees, validate_tree
from meshwright.configs.sections.outer import PAIRWISE_RULES, RULES
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.infer import inference_session
from meshwright.train.launch.local_islands import serve_rendezvous
from meshwright.train.report.merge_islands import merge_islands
from meshwright.train.run import train

BASE = merge_trees(
    TINY,
    {
        "name": "run",
        "steps": 9,
        "model": {"vocab": 384, "embed": 32},
        "optimizer": {"name": "sgd", "b1": 0.0, "weight_decay": 0.0},
        "checkpoint": {"every": 4},
        "evaluation": {"batches": 2},
        "logging": {"every": 1, "tensorboard": False, "peak_tflops": 1},
    },
)
QUICK = {"patience": 20, "timeout": 5, "ttl": 3, "gather": 60}
DEEP = {"model": {"layers": 6}}  # over 2 x 2 stages they are not in order, and two stages have an empty place
OUTER = {name: {"name": name, "every": 3} for name in RULES} | {
    "streaming": {"name": "streaming", "every": 3, "fragments": 3, "overlap": 1},
    "noloco": {"name": "noloco", "every": 2},
}


class Group:
    """Islands of one run, each a process, in `root`."""

    def __init__(self, root, address, **changes):
        self.root, self.address, self.jobs = root, address, []
        (root / "run.yaml").write_text(dump_yaml(validate_tree(merge_trees(BASE, changes))))

    def start(self, number, *overrides):
        own = [f"islands.number={number}", f"islands.meet={self.address}", *overrides]
        command = [sys.executable, "-m", "meshwright.train.cli", "train", "run.yaml", *own]
        log = (self.root / f"{number}.log").open("ab")
        job = subprocess.Popen(command, cwd=self.root, stdout=log, stderr=log)
        log.close()
        self.jobs.append(job)
        return job

    def events(self, number):
        file = self.root / "runs" / "run" / f"island-{number}" / "events.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_step(self, number, step):
        """Wait until island `number` has made update `step`."""
        run = self.root / "runs" / "run" / f"island-{number}"
        made = lambda: any(row["step"] >= step for row in metric_rows(run)[-2:])
        wait_until(made, explain=lambda: f"no update {step} of island {number}: {self.log(number)}")

    def wait_event(self, number, kind):
        happened = lambda: kind in [event["event"] for event in self.events(number)]
        wait_until(happened, explain=lambda: f"no {kind} of island {number}: {self.log(number)}")

    def log(self, number):
        return (self.root / f"{number}.log").read_text()[-2000:]

    def wait_ended(self, number, job, code=0):
        assert job.wait(timeout=HANG_SECONDS) == code, self.log(number)


@contextmanager
def group(root, **changes):
    with serve_rendezvous() as address:
        made = Group(root, address, **changes)
        try:
            yield made
        finally:
            for job in made.jobs:
                job.kill()
                job.wait()


def state_of(directory):
    program, state = inference_session.load_program(inference_session.inference_config(directory, []), directory)
    return jax.device_get((program.eval_params(state), state.params))


def distance(tree, expected):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), tree, expected)))


def on_a_mesh(root, rule, count, **more):
    """The same run on a mesh of replicas: what is evaluated, and every replica's parameters."""
    changes = {"mesh": {"replica": count}, "outer": OUTER[rule], "name": "mesh"}
    train(validate_tree(merge_trees(merge_trees(BASE, changes), more)), process_info=ProcessInfo(), root=root)
    return state_of(root / "mesh")


def test_islands_of_unlike_shape_are_the_replicas_of_a_mesh_and_refuse_a_stranger(tmp_path):
    with group(tmp_path, outer=OUTER["streaming"], islands={"count": 2, **QUICK}, **DEEP) as islands:
        first = islands.start(0)
        islands.wait_event(0, "start")
        stranger = islands.start(1, "optimizer.learning_rate=0.02", "name=other")
        islands.wait_ended(1, stranger, code=2)
        assert "another run: optimizer.learning_rate (0.01 there, 0.02 here)" in islands.log(1).replace("\n", " ")
        second = islands.start(1, "mesh={fsdp: 2, pipe: 2}", "microbatches=2", "pipeline.schedule=zb-v")
        islands.wait_ended(0, first)
        islands.wait_ended(1, second)
    wanted, _ = on_a_mesh(tmp_path, "streaming", 2, **DEEP)
    run = tmp_path / "runs" / "run"
    for number in range(2):
        assert distance(state_of(run / f"island-{number}")[0], wanted) < 1e-6
    for one in merge_islands(run)["islands"]:
        assert one["sent_bytes"] == pytest.approx(one["predicted_sent_bytes"], rel=0.02)
        assert not {"behind", "excluded", "bootstrap"} & one.keys()
    assert list(losses(run)) == list(range(1, 10))
    assert (
        inference_session.evaluate(inference_session.newest_island(run), []).keys() >= {"held_out_loss"}
        and (run / "report.html").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_four_islands_are_four_replicas(tmp_path, rule):
    with group(tmp_path, outer=OUTER[rule], islands={"count": 4, **QUICK, "patience": 60}) as islands:
        jobs = [islands.start(number) for number in range(4)]
        for number, job in enumerate(jobs):
            islands.wait_ended(number, job)
    wanted, each = on_a_mesh(tmp_path, rule, 4)
    for number in range(4):
        outer, params = state_of(tmp_path / "runs" / "run" / f"island-{number}")
        assert distance(params, jax.tree.map(lambda leaf: leaf[number], each)) < 1e-6  # noqa: B023
        assert rule in (*PAIRWISE_RULES, "eager") or distance(outer, wanted) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["streaming", "noloco"])
def test_one_of_three_is_killed_and_another_stopped_and_all_end_together(tmp_path, rule):
    """The killed one returns with others' state; the stopped one is given up, and finds its place when it wakes."""
    quick = {**QUICK, "patience": 6, "ttl": 2}
    with group(tmp_path, steps=3000, outer=OUTER[rule], islands={"count": 3, **quick}, data={"global_batch": 6},
               checkpoint={"every": 500}) as islands:  # fmt: skip
        jobs = [islands.start(number) for number in range(3)]
        for number in range(3):
            islands.wait_step(number, 20)
        jobs[2].kill()
        jobs[2].wait()
        jobs[1].send_signal(signal.SIGSTOP)
        islands.wait_step(0, 1000)  # farther than the rendezvous remembers who met
        jobs[2] = islands.start(2)
        jobs[1].send_signal(signal.SIGCONT)
        for number, job in enumerate(jobs):
            islands.wait_ended(number, job)
    outer = [state_of(tmp_path / "runs" / "run" / f"island-{number}")[0] for number in range(3)]
    if rule != "noloco":
        assert distance(outer[0], outer[1]) < 1e-6 and distance(outer[0], outer[2]) < 1e-6
    for number in (1, 2):
        assert any(one["event"] == "bootstrap" for one in islands.events(number)), islands.events(number)[-5:]


def test_the_directory_of_all_leads_to_the_newest_island(tmp_path):
    for number, step in ((0, 4), (1, 8)):
        (tmp_path / f"island-{number}" / "checkpoints" / str(step)).mkdir(parents=True)
    assert inference_session.newest_island(tmp_path) == tmp_path / "island-1"
    assert inference_session.newest_island(tmp_path / "island-0") == tmp_path / "island-0"
