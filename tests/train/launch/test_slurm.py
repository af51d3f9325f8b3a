"""The engine `slurm`: submitit with its local executor, and with a scheduler of this machine's that speaks SLURM."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.configs.sections.launch import LaunchConfig, SlurmConfig
from meshwright.train.core.event_log import read_events
from meshwright.train.launch import slurm
from meshwright.train.launch.job import Job, needed

pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
SUPPORT = Path(__file__).parents[2] / "support"
WORKER = [sys.executable, str(SUPPORT / "fake_worker.py")]
SLOW = {"process": "any", "epoch": 1, "point": "step", "step": "any", "kind": "slow"}
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture
def scheduler(tmp_path, monkeypatch):
    """SLURM's commands on PATH; the directory of its jobs."""
    commands, root = tmp_path / "bin", tmp_path / "slurm"
    commands.mkdir()
    root.mkdir()
    for name in ("sbatch", "srun", "scontrol", "scancel", "squeue", "sacct", "requeue"):
        shutil.copy(SUPPORT / "fake_slurm.py", commands / name)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(root))
    yield root
    subprocess.run([commands / "scancel", "1", "--signal=KILL"], check=False)


def job(directory, *faults, settings=None, processes=2):
    run = directory / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    (run / "faults.json").write_text(json.dumps(faults))
    elastic = ElasticConfig(backoff=0.01, hang_floor=20, start_timeout=60, grace=10)
    launch = LaunchConfig(slurm=settings or SlurmConfig(partition="gpu", account="us", time=90, setup=["export A=1"]))
    return Job("run", [*WORKER, str(run)], processes, run, elastic, launch)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)
    return found


def finished(directory, processes=2):
    """The last state each worker told, once all have finished."""
    files = [directory / "run" / f"worker-{number}.jsonl" for number in range(processes)]

    def told():
        lines = [json.loads(file.read_text().splitlines()[-1]) for file in files if file.exists()]
        return len(lines) == processes and all(line["event"] == "finish" for line in lines) and lines

    return {line["state"] for line in until(told)}


def test_a_job_is_sent_and_supervises_itself(scheduler, tmp_path, capsys):
    """A trainer dies: it is started again in the allocation, without the scheduler."""
    slurm.launch(job(tmp_path, {"process": 1, "epoch": 1, "point": "step", "step": 5, "kind": "kill"}))
    told = capsys.readouterr().out
    assert "job 1: run, 2 processes on 1 nodes" in told and "scancel 1" in told
    script = (scheduler / "1" / "script").read_text()
    for line in ("--partition=gpu", "--account=us", "--time=90", "--nodes=1", "--requeue", "--signal=USR2@70"):
        assert f"#SBATCH {line}" in script, line
    assert "export A=1" in script and "srun" in script and "--ntasks=1 --overlap" in script
    assert len(finished(tmp_path)) == 1 and len((scheduler / "1" / "runs").read_text().splitlines()) == 1
    assert [event["suspect"] for event in read_events(tmp_path / "run") if event["event"] == "restart"] == [1]
    log = Path(next(line.split()[1] for line in told.splitlines() if line.startswith("logs")))
    until(lambda: "completed successfully" in log.read_text() and not list((scheduler / "1").glob("task-*")))


def test_out_of_time_it_saves_and_is_queued_again(scheduler, tmp_path):
    """SIGUSR2, as SLURM sends it before the end, to every process of every step: only the supervisor answers."""
    slurm.launch(job(tmp_path, SLOW, SLOW, SLOW))
    until((tmp_path / "run" / "met" / "1" / "5").exists)
    subprocess.run(["scancel", "1", "--signal=USR2"], check=True)
    assert len(finished(tmp_path)) == 1
    assert (scheduler / "1" / "calls").read_text() == "requeue 1\n"
    assert len((scheduler / "1" / "runs").read_text().splitlines()) == 2
    told = [json.loads(line) for line in (tmp_path / "run" / "worker-0.jsonl").read_text().splitlines()]
    applied = [event["step"] for event in told if event["event"] == "applied"]
    assert applied == list(range(1, 13)), "it went on at the step it was stopped at: none was made again"


def test_cancelled_it_saves_and_ends_with_75(scheduler, tmp_path):
    slurm.launch(job(tmp_path, SLOW))
    until((tmp_path / "run" / "met" / "1" / "5").exists)
    subprocess.run(["scancel", "1"], check=True)
    until(lambda: not list((scheduler / "1").glob("task-*")))
    saved = {int(file.name) for file in (tmp_path / "run" / "checkpoints").iterdir()}
    assert max(saved) >= 4 and not (scheduler / "1" / "calls").exists()


def test_the_local_executor_runs_the_same_job(tmp_path, capsys):
    slurm.launch(job(tmp_path, settings=SlurmConfig(executor="local")))
    assert len(finished(tmp_path)) == 1 and "2 processes on 1 nodes" in capsys.readouterr().out


WRONG = {
    "nodes": (SlurmConfig(nodes=3), 4, "launch.slurm.nodes: 4 processes do not share 3 nodes evenly"),
    "gpus": (SlurmConfig(gpus_per_node=4), 3, "launch.slurm.gpus_per_node: 3 processes do not share 4 GPUs"),
    "local": (SlurmConfig(nodes=2, executor="local"), 2, "launch.slurm.nodes: 2 with executor local"),
}


@pytest.mark.parametrize(("settings", "processes", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_shared_is_refused(settings, processes, message):
    with pytest.raises(UserError, match=message):
        slurm.check(settings, processes=processes)


def test_steps_have_the_shape_of_the_job():
    hosts = slurm.StepHosts(SlurmConfig(nodes=2, gpus_per_node=8, cpus_per_task=6), processes=4)
    assert hosts.step(2, 4)[4:] == ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2",
                                    "--distribution=block", "--cpus-per-task=6",
                                    "--gpus-per-task=4"]  # fmt: skip


def test_a_missing_extra_is_told_with_its_command():
    with pytest.raises(UserError, match=r"pip install 'meshwright\[slurm\]'") as mistake:
        needed("submitit_that_is_not_there", "slurm")
    assert mistake.value.exit_code == 2
