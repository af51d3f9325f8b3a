"""`meshwright bench lowcomm islands`: four islands on one machine over a throttled link, with random kills.

    undisturbed    the unchanged configuration
    killed         a random island's trainer is killed every few seconds; its launcher starts it again
    every-step     the islands synchronize after every update, in float32: data parallelism over that link

Rows run one after another: losses of the first two are compared, and seconds per step of the first and last.

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

from .harness import bench_parser

EVERY_STEP = {"name": "local-sgd", "every": 1, "learning_rate": None, "momentum": None, "fragments": None}
EVERY_STEP |= {"overlap": None, "mix": None, "wire": "float32"}


def row_overrides(options: argparse.Namespace, row: str) -> list[str]:
    """Overrides of `meshwright launch CONFIG --islands N` for `row`."""
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
        *options.overrides,
        *([f"outer={json.dumps(EVERY_STEP)}"] if row == "every-step" else []),
    ]


def measure(options: argparse.Namespace, row: str) -> dict[str, Any]:
    """Run `row` to its end; return seconds, losses, bytes, and the number of kills."""
    command = [sys.executable, "-m", "meshwright.train.cli", "launch", options.config]
    command += ["--islands", str(options.islands), *row_overrides(options, row)]
    began = time.monotonic()
    with (options.directory / f"{row}.log").open("wb") as log:
        job = subprocess.Popen(command, cwd=options.directory, stdout=log, stderr=log)
    killed: list[int] = []
    if row == "killed":
        threading.Thread(target=kill_trainers, args=(job, options, killed), daemon=True).start()
    code = job.wait()
    run = options.directory / "runs" / row
    if code:
        raise RuntimeError(f"{row} ended with {code}; see {options.directory / row}.log and {run}/launch")
    islands = json.loads((run / "summary.json").read_text())["islands"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step_seconds"] for row in rows if "step_seconds" in row]
    return {
        "seconds": time.monotonic() - began,
        "held_out_loss": statistics.mean(island["held_out_loss"] for island in islands),
        "mean_step_seconds": statistics.mean(steps[5:]),
        "sent_megabytes": statistics.mean(island["sent_bytes"] for island in islands) / 1e6,
        "measured_over_predicted": [island["sent_bytes"] / island["predicted_sent_bytes"] for island in islands],
        "killed": len(killed),
        "bootstraps": sum(island.get("bootstrap", 0) for island in islands),
    }


def kill_trainers(job: subprocess.Popen, options: argparse.Namespace, killed: list[int]) -> None:
    """Kill a random trainer of `job` every `options.kill_every` seconds until the job ends; append to `killed`."""
    generator = random.Random(options.seed)
    while True:
        time.sleep(options.kill_every)
        if job.poll() is not None:
            return
        victims = [process for process in psutil.Process(job.pid).children(recursive=True) if is_trainer(process)]
        if victims:
            victim = generator.choice(victims)
            victim.kill()
            killed.append(victim.pid)


def is_trainer(process: psutil.Process) -> bool:
    """Whether `process` is a trainer, not a launcher."""
    try:
        return "train" in process.cmdline()
    except psutil.Error:
        return False


def main(arguments: Sequence[str]) -> None:
    """Run the rows and print the ratios."""
    parser = bench_parser("lowcomm islands", __doc__)
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
    parser.add_argument("overrides", nargs="*", help="key.sub=value of every row")
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
