"""The engine `slurm`: submitit with its local executor, and with a scheduler of this machine's that speaks SLURM."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.fake_jobs import WORKER, last_states, make_run, restarts, worker_event_log
from support.waiting import wait_until

from meshwright.configs.errors import UserError
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.configs.sections.launch import LaunchConfig, SlurmConfig
from meshwright.train.launch import slurm
from meshwright.train.launch.job import Job, import_optional

pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
SUPPORT = Path(__file__).parents[2] / "support"
SLOW = ("any", 1, "step", "any", "slow")
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
    run = make_run(directory / "run", *faults)
    elastic = ElasticConfig(backoff=0.01, hang_floor=20, start_timeout=60, grace=10)
    launch = LaunchConfig(slurm=settings or SlurmConfig(partition="gpu", account="us", time=90, setup=["export A=1"]))
    return Job("run", [*WORKER, str(run)], processes, run, elastic, launch)


def finished(directory, processes=2):
    """The last state of each worker, once all have finished."""
    files = [directory / "run" / f"worker-{index}.jsonl" for index in range(processes)]

    def states():
        states = last_states(directory / "run", processes) if all(file.exists() for file in files) else {None}
        return None not in states and states

    return wait_until(states)


def test_a_submitted_job_supervises_itself(scheduler, tmp_path, capsys):
    """A trainer dies: it is started again in the allocation, without the scheduler."""
    slurm.launch(job(tmp_path, (1, 1, "step", 5, "kill")))
    printed = capsys.readouterr().out
    assert "job 1: run, 2 processes on 1 nodes" in printed and "scancel 1" in printed
    script = (scheduler / "1" / "script").read_text()
    for line in ("--partition=gpu", "--account=us", "--time=90", "--nodes=1", "--requeue", "--signal=USR2@70"):
        assert f"#SBATCH {line}" in script, line
    assert "export A=1" in script and "srun" in script and "--ntasks=1 --overlap" in script
    assert len(finished(tmp_path)) == 1 and len((scheduler / "1" / "runs").read_text().splitlines()) == 1
    assert [event["suspect"] for event in restarts(tmp_path / "run")] == [1]
    log = Path(next(line.split()[1] for line in printed.splitlines() if line.startswith("logs")))
    wait_until(lambda: "completed successfully" in log.read_text() and not list((scheduler / "1").glob("task-*")))


def test_a_job_out_of_time_saves_and_is_queued_again(scheduler, tmp_path):
    """SIGUSR2, as SLURM sends it before the end, to every process of every step: only the supervisor answers."""
    slurm.launch(job(tmp_path, SLOW, SLOW, SLOW))
    wait_until((tmp_path / "run" / "met" / "1" / "5").exists)
    subprocess.run(["scancel", "1", "--signal=USR2"], check=True)
    assert len(finished(tmp_path)) == 1
    assert (scheduler / "1" / "calls").read_text() == "requeue 1\n"
    assert len((scheduler / "1" / "runs").read_text().splitlines()) == 2
    applied = [event["step"] for event in worker_event_log(tmp_path / "run", 0) if event["event"] == "applied"]
    assert applied == list(range(1, 13)), "it went on at the step it was stopped at: none was made again"


def test_a_cancelled_job_saves_and_ends(scheduler, tmp_path):
    slurm.launch(job(tmp_path, SLOW))
    wait_until((tmp_path / "run" / "met" / "1" / "5").exists)
    subprocess.run(["scancel", "1"], check=True)
    wait_until(lambda: not list((scheduler / "1").glob("task-*")))
    saved = {int(file.name) for file in (tmp_path / "run" / "checkpoints").iterdir()}
    assert max(saved) >= 4 and not (scheduler / "1" / "calls").exists()


def test_the_local_executor_runs_the_same_job(tmp_path, capsys):
    slurm.launch(job(tmp_path, settings=SlurmConfig(executor="local")))
    assert len(finished(tmp_path)) == 1 and "2 processes on 1 nodes" in capsys.readouterr().out


WRONG = {
    "nodes": (SlurmConfig(nodes=3), 4, "launch.slurm.nodes: 4 processes do not share 3 nodes evenly"),
    "gpus": (SlurmConfig(gpus_per_node=4), 3, "launch.slurm.gpus_per_node: 3 processes do not share 4 GPUs"),
    "gres": (SlurmConfig(nodes=2, gres="gpu:mi300x:8"), 4, "launch.slurm.gres: gpu:mi300x:8 is a node's"),
    "local": (SlurmConfig(nodes=2, executor="local"), 2, "launch.slurm.nodes: 2 with executor local"),
}


@pytest.mark.parametrize(("settings", "processes", "message"), WRONG.values(), ids=WRONG)
def test_uneven_shares_of_nodes_or_gpus_are_refused(settings, processes, message):
    with pytest.raises(UserError, match=message):
        slurm.check_nodes(settings, processes=processes)


def test_srun_gets_the_nodes_tasks_and_gpus_of_the_job():
    hosts = slurm.SlurmHosts(SlurmConfig(nodes=2, gpus_per_node=8, cpus_per_task=6), processes=4)
    assert hosts.srun_command(2, 4)[4:] == ["--nodes=2", "--ntasks=4", "--ntasks-per-node=2",
                                    "--distribution=block", "--cpus-per-task=6",
                                    "--gpus-per-task=4"]  # fmt: skip


def test_other_generic_resources_of_a_node_are_asked_for_in_the_job_and_its_steps():
    settings = SlurmConfig(nodes=2, gres="gpu:mi300x:8")
    assert slurm.executor_parameters(settings, name="a", grace=1)["slurm_gres"] == "gpu:mi300x:8"
    assert "--gres=gpu:mi300x:8" in slurm.SlurmHosts(settings, processes=2).srun_command(2, 2)


def test_a_missing_extra_is_an_error_with_the_command_that_installs_it():
    with pytest.raises(UserError, match=r"pip install 'meshwright\[slurm\]'") as mistake:
        import_optional("submitit_that_is_not_there", "slurm")
    assert mistake.value.exit_code == 2
