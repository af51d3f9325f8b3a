"""`meshwright bench lowcomm islands`: four jobs on loopback, over a throttled link, one of them killed now and then.

    undisturbed    the configuration as it is
    killed         the same while a random island's trainer is killed every so often; its launcher starts it again
    every-step     the same islands meeting after every update, in float32: data parallelism over that link

Rows are of one machine after another: losses of the first two are compared, and seconds a step of the first and last.

    meshwright bench lowcomm islands
    meshwright bench lowcomm islands --steps 600 --kill-every 30 --bandwidth 100Mbit
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

EVERY_STEP = {"name": "local-sgd", "every": 1, "learning_rate": None, "momentum": None, "fragments": None}
EVERY_STEP |= {"overlap": None, "mix": None, "wire": "float32"}


def row_overrides(options: argparse.Namespace, row: str) -> list[str]:
    """What is typed after `meshwright launch CONFIG --islands N`."""
    steps = options.steps if row != "every-step" else options.reference_steps
    return [
        f"name={row}",
        f"steps={steps}",
        f"optimizer.warmup_steps={min(20, steps // 2)}",
        f"islands={{bandwidth: {options.bandwidth}, latency: {options.latency}}}",
        "elastic={restarts: 1000, backoff: 0}",
        "checkpoint.every=50",
        f"evaluation={{every: {max(steps // 4, 1)}, batches: 8, prompts: []}}",
        "logging={every: 1, tensorboard: false, peak_tflops: 1}",
        *options.words,
        *([f"outer={json.dumps(EVERY_STEP)}"] if row == "every-step" else []),  # whatever the others' outer is
    ]


def measure(options: argparse.Namespace, row: str) -> dict[str, Any]:
    """Run one row to its end: seconds, losses, bytes, and how many islands were killed."""
    command = [
        sys.executable,
        "-m",
        "meshwright.train.cli",
        "launch",
        options.config,
        "--islands",
        str(options.islands),
    ]
    began = time.monotonic()
    with (options.directory / f"{row}.log").open("wb") as log:
        job = subprocess.Popen([*command, *row_overrides(options, row)], cwd=options.directory, stdout=log, stderr=log)
    killed: list[int] = []
    if row == "killed":
        threading.Thread(target=kill_now_and_then, args=(job, options, killed), daemon=True).start()
    code = job.wait()
    run = options.directory / "runs" / row
    if code:
        raise RuntimeError(f"{row} ended with {code}; see {options.directory / row}.log and {run}/launch")
    told = json.loads((run / "summary.json").read_text())["islands"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [one["step_seconds"] for one in rows if "step_seconds" in one]
    return {
        "seconds": time.monotonic() - began,
        "held_out_loss": statistics.mean(one["held_out_loss"] for one in told),
        "mean_step_seconds": statistics.mean(steps[5:]),
        "sent_megabytes": statistics.mean(one["sent_bytes"] for one in told) / 1e6,
        "measured_over_predicted": [one["sent_bytes"] / one["predicted_sent_bytes"] for one in told],
        "killed": len(killed),
        "bootstraps": sum(one.get("bootstrap", 0) for one in told),
    }


def kill_now_and_then(job: subprocess.Popen, options: argparse.Namespace, killed: list[int]) -> None:
    """Every `kill_every` seconds SIGKILL a random trainer of `job`, until it ends."""
    chance = random.Random(options.seed)
    while True:
        time.sleep(options.kill_every)
        if job.poll() is not None:
            return
        victims = [process for process in psutil.Process(job.pid).children(recursive=True) if trains(process)]
        if victims:
            victim = chance.choice(victims)
            victim.kill()
            killed.append(victim.pid)


def trains(process: psutil.Process) -> bool:
    """Whether a process is a trainer, not a launcher."""
    try:
        return "train" in process.cmdline()
    except psutil.Error:
        return False


def main(arguments: Sequence[str]) -> None:
    """Parse, run the rows, print the ratios."""
    parser = argparse.ArgumentParser(
        prog="meshwright bench lowcomm islands",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default="lowcomm/islands")
    parser.add_argument("--islands", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--reference-steps", type=int, default=30, help="updates of every-step")
    parser.add_argument("--bandwidth", default="100Mbit")
    parser.add_argument("--latency", default="50ms")
    parser.add_argument("--kill-every", type=float, default=30.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=["undisturbed", "killed", "every-step"])
    parser.add_argument("--directory", type=Path, default=Path("."), help="where runs/ is made")
    parser.add_argument("words", nargs="*", help="key.sub=value of every row")
    options = parser.parse_args(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    results = {}
    for row in options.only:
        results[row] = measure(options, row)
        print(f"{row}: {json.dumps(results[row])}", flush=True)
    if {"undisturbed", "killed"} <= results.keys():
        ratio = results["killed"]["held_out_loss"] / results["undisturbed"]["held_out_loss"]
        print(f"held-out loss, killed over undisturbed: {ratio:.4f}")
    if {"undisturbed", "every-step"} <= results.keys():
        ratio = results["every-step"]["mean_step_seconds"] / results["undisturbed"]["mean_step_seconds"]
        print(f"seconds a step, every-step over undisturbed: {ratio:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
