#!/usr/bin/env python3
"""SLURM's commands, as far as a batch job needs them: sbatch, srun, scontrol requeue, scancel, squeue on one machine.

Called by the name of the command. FAKE_SLURM is a directory: one folder a job, with its script, its state, the process
ids of its tasks, and `calls`, what was asked.
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


def options(words):
    """(options by name, the rest) of a command line; every option but --overlap and --unbuffered has a value."""
    found, words = {}, list(words)
    while words and words[0].startswith("--"):
        name, equals, value = words.pop(0)[2:].partition("=")
        found[name] = value if equals or name in ("overlap", "unbuffered") else words.pop(0)
    return found, words


def sbatch(words):
    number = str(len(list(ROOT.glob("[0-9]*"))) + 1)
    (ROOT / number).mkdir()
    (ROOT / number / "script").write_text(Path(words[-1]).read_text())
    begin(number)
    print(f"Submitted batch job {number}")


def begin(number):
    """The script, in the background, as SLURM runs it on the first node."""
    folder = ROOT / number
    script = (folder / "script").read_text()
    given = dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", script))
    runs = (folder / "runs").read_text().count("\n") if (folder / "runs").exists() else 0
    with (folder / "runs").open("a") as file:
        file.write(f"{time.time()}\n")
    environment = os.environ | {
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_NNODES": given["nodes"],
        "SLURM_NTASKS": "1",
        "SLURM_CPU_BIND": "of another step",
        "SLURM_RESTART_COUNT": str(runs),
        "SLURMD_NODENAME": "127.0.0.1",
    }
    with open(given["output"].strip("'").replace("%j", number), "a") as out:
        subprocess.Popen(
            ["bash", str(folder / "script")], env=environment, stdout=out, stderr=out, start_new_session=True
        )


def srun(words):
    given, command = options(words)
    number, tasks = os.environ["SLURM_JOB_ID"], int(given.get("ntasks", 1))
    if "SLURM_CPU_BIND" in os.environ and "output" not in given:
        sys.exit("srun: the step inherited the shape of another")
    running = []
    for task in range(tasks):
        place = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_NTASKS": str(tasks)}
        names = [
            given.get(word, os.devnull).replace("%j", number).replace("%t", str(task)) for word in ("output", "error")
        ]
        out, err = (os.open(name, os.O_CREAT | os.O_APPEND | os.O_WRONLY) for name in names)
        running.append(subprocess.Popen(command, env=os.environ | place, stdout=out, stderr=err))
        (ROOT / number / f"task-{running[-1].pid}").touch()
    for told in (signal.SIGTERM, signal.SIGINT):
        signal.signal(told, lambda signum, _: [one.send_signal(signum) for one in running])
    for told in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(told, signal.SIG_IGN)
    codes = [one.wait() for one in running]
    for one in running:
        (ROOT / number / f"task-{one.pid}").unlink(missing_ok=True)
    sys.exit(max(code if code >= 0 else 128 - code for code in codes))


def scontrol(words):
    number = words[1]
    with (ROOT / number / "calls").open("a") as file:
        file.write(f"{' '.join(words)}\n")
    subprocess.Popen([sys.argv[0].replace("scontrol", "requeue"), number], start_new_session=True)


def requeue(words):
    """SLURM's own part of it: what runs ends, then the script begins again."""
    while list((ROOT / words[0]).glob("task-*")):
        time.sleep(0.05)
    begin(words[0])


def scancel(words):
    number = next(word for word in words if word.isdigit())
    given, _ = options([word for word in words if word != number])
    for task in (ROOT / number).glob("task-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(task.name.removeprefix("task-")), getattr(signal, f"SIG{given.get('signal', 'TERM')}"))


def squeue(words):
    del words
    print("\n".join(folder.name for folder in ROOT.glob("[0-9]*") if list(folder.glob("task-*"))))


if __name__ == "__main__":
    globals()[Path(sys.argv[0]).name](sys.argv[1:])
