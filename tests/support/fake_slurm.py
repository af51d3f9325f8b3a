#!/usr/bin/env python3
"""SLURM's commands, as far as a batch job needs them: sbatch, srun, scontrol requeue, scancel, squeue on one machine.

Called by the name of the command. FAKE_SLURM is a directory: one folder a job, with its `script`, a line in `runs` for
each time it was run, a file `task-PID` for each running task, and `calls`, the arguments of scontrol.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(os.environ["FAKE_SLURM"])


def parse_options(arguments):
    """(options by name, the rest) of a command line; every option but --overlap and --unbuffered has a value."""
    options, arguments = {}, list(arguments)
    while arguments and arguments[0].startswith("--"):
        name, equals, value = arguments.pop(0)[2:].partition("=")
        options[name] = value if equals or name in ("overlap", "unbuffered") else arguments.pop(0)
    return options, arguments


def sbatch(arguments):
    job = str(len(list(ROOT.glob("[0-9]*"))) + 1)
    (ROOT / job).mkdir()
    (ROOT / job / "script").write_text(Path(arguments[-1]).read_text())
    run_script(job)
    print(f"Submitted batch job {job}")


def run_script(job):
    """Start the script of a job in the background, as SLURM does on the first node."""
    folder = ROOT / job
    script = (folder / "script").read_text()
    options = dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", script))
    runs = (folder / "runs").read_text().count("\n") if (folder / "runs").exists() else 0
    with (folder / "runs").open("a") as file:
        file.write(f"{time.time()}\n")
    environment = os.environ | {
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_NNODES": options["nodes"],
        "SLURM_NTASKS": "1",
        "SLURM_CPU_BIND": "of another step",
        "SLURM_RESTART_COUNT": str(runs),
        "SLURMD_NODENAME": "127.0.0.1",
    }
    with open(options["output"].strip("'").replace("%j", job), "a") as out:
        subprocess.Popen(
            ["bash", str(folder / "script")], env=environment, stdout=out, stderr=out, start_new_session=True
        )


def srun(arguments):
    options, command = parse_options(arguments)
    job, tasks = os.environ["SLURM_JOB_ID"], int(options.get("ntasks", 1))
    if "SLURM_CPU_BIND" in os.environ and "output" not in options:
        sys.exit("srun: the step inherited the shape of another")
    running = []
    for task in range(tasks):
        variables = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_NTASKS": str(tasks)}
        files = [options.get(name, os.devnull).replace("%j", job) for name in ("output", "error")]
        out, err = (os.open(file.replace("%t", str(task)), os.O_CREAT | os.O_APPEND | os.O_WRONLY) for file in files)
        running.append(subprocess.Popen(command, env=os.environ | variables, stdout=out, stderr=err))
        (ROOT / job / f"task-{running[-1].pid}").touch()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, _: [step.send_signal(number) for step in running])
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    codes = [step.wait() for step in running]
    for step in running:
        (ROOT / job / f"task-{step.pid}").unlink(missing_ok=True)
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))


def scontrol(arguments):
    job = arguments[1]
    with (ROOT / job / "calls").open("a") as file:
        file.write(f"{' '.join(arguments)}\n")
    subprocess.Popen([sys.argv[0].replace("scontrol", "requeue"), job], start_new_session=True)


def requeue(arguments):
    """Wait until what runs has ended, then run the script again."""
    while list((ROOT / arguments[0]).glob("task-*")):
        time.sleep(0.05)
    run_script(arguments[0])


def scancel(arguments):
    job = next(argument for argument in arguments if argument.isdigit())
    options, _ = parse_options([argument for argument in arguments if argument != job])
    for task in (ROOT / job).glob("task-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(task.name.removeprefix("task-")), getattr(signal, f"SIG{options.get('signal', 'TERM')}"))


def squeue(arguments):
    del arguments
    print("\n".join(folder.name for folder in ROOT.glob("[0-9]*") if list(folder.glob("task-*"))))


if __name__ == "__main__":
    globals()[Path(sys.argv[0]).name](sys.argv[1:])
