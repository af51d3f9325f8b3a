"""`meshwright bench lowcomm`: held-out loss of outer optimizers next to that of data parallelism, at equal tokens.

Every row trains the same model on the same tokens of the standard library's source, from the same seeds, with the same
inner optimizer and global batch; rows differ in the outer optimizer and the number of replicas. Each run is a process
of its own, one after another. The loss is that of all held-out documents: the first ones, in order of their names, are
mostly tables of codecs.

    meshwright bench lowcomm                                1000 updates, one seed: about half an hour on 2 cores
    meshwright bench lowcomm --size tiny --steps 4000 --every 30       the table of docs/lowcomm.md
    meshwright bench lowcomm --only data-parallel streaming-4bit-2 --outer learning_rate=0.7 momentum=0.5
    meshwright bench lowcomm --size tiny --steps 500        a quick test
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import islands
from .harness import bench_parser

STREAMING = {"name": "streaming", "fragments": 4, "overlap": 1, "mix": 0.5, "wire": "e3m0"}

# Row -> (replicas, the section outer without `every`), as in the papers. NoLoCo synchronizes twice as often, as in its
# paper. local-sgd averages the parameters and has no outer optimizer.
ROWS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "data-parallel": (1, None),
    "local-sgd-2": (2, {"name": "local-sgd"}),
    "diloco-2": (2, {"name": "diloco"}),
    "streaming-4bit-2": (2, STREAMING),
    "diloco-4": (4, {"name": "diloco"}),
    "streaming-4bit-4": (4, STREAMING),
    "noloco-4": (4, {"name": "noloco"}),
}
# Size -> overrides for model and data. tiny is for quick tests, and for shared machines.
SIZES = {
    "1m": (
        "model={layers: 4, embed: 128, heads: 4, kv_heads: 2, mlp: 352}",
        "data={sequence_length: 128, global_batch: 16}",
    ),
    "tiny": (
        "model={vocab: 512, layers: 4, embed: 64, heads: 4, kv_heads: 2, mlp: 176}",
        "data={tokenizer: {vocab: 512}, sequence_length: 64, global_batch: 32}",
    ),
}
BASE = (
    "model.scan=false",
    "checkpoint.every=0",
    "logging={every: 50, tensorboard: false, peak_tflops: 1}",
)


def row_overrides(row: str, *, seed: int, options: argparse.Namespace) -> list[str]:
    """Overrides of `meshwright train quickstart` for a run of `row` with `options` of the command line."""
    replicas, outer = ROWS[row]
    every, steps, learning_rate = options.every, options.steps, options.learning_rate
    if outer:
        outer = outer | {"every": max(every // 2, 1) if outer["name"] == "noloco" else every}
        outer |= {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in options.outer)}
    inner = {"name": "adamw", "learning_rate": learning_rate, "schedule": "cosine", "decay_steps": None, "clip": 1.0}
    mesh = dict.fromkeys(("data", "fsdp", "tensor"), 1) | {"replica": replicas, "devices": replicas}
    return [
        f"seed={seed}",
        f"steps={steps}",
        f"mesh={json.dumps(mesh)}",
        f"outer={json.dumps(outer)}",
        f"optimizer={json.dumps(inner | {'warmup_steps': min(50, steps // 10)})}",
        f"evaluation={{every: {max(steps // 4, 1)}, batches: null, prompts: []}}",
        *SIZES[options.size],
        *BASE,
    ]


def measure(overrides: Sequence[str], *, name: str, directory: Path) -> dict[str, Any]:
    """Train with `overrides` in `directory`; return held-out loss by step, spread of the replicas and bytes sent."""
    command = [sys.executable, "-m", "meshwright.train.cli", "train", "quickstart", f"name={name}", *overrides]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-500:]}")
    file = directory / "runs" / name / "metrics.jsonl"
    seen = [json.loads(line) for line in file.read_text().splitlines()]
    held_out = [one for one in seen if "held_out_loss" in one]
    trained = [one for one in seen if "loss" in one]
    return {
        "curve": {one["step"]: one["held_out_loss"] for one in held_out},
        "spread": {one["step"]: one["replica_spread"] for one in held_out if "replica_spread" in one},
        "sent_bytes": trained[-1].get("sent_bytes"),
        "step_seconds": statistics.median(one["step_seconds"] for one in trained),
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Final held-out loss of each row, the mean over its seeds, and how far it is above data parallelism's."""
    final = {row: statistics.mean(list(one["curve"].values())[-1] for one in runs) for row, runs in results.items()}
    reference = final.get("data-parallel")
    lines = [f"{'row':20} {'held-out loss':>14} {'above data-parallel':>20} {'MB sent a replica':>18} {'spread':>8}"]
    for row, runs in results.items():
        above = f"{100 * (final[row] / reference - 1):+.2f} %" if reference else "-"
        sent = f"{runs[0]['sent_bytes'] / 1e6:.1f}" if runs[0]["sent_bytes"] else "-"
        spread = f"{list(runs[0]['spread'].values())[-1]:.4f}" if runs[0]["spread"] else "-"
        lines.append(f"{row:20} {final[row]:14.4f} {above:>20} {sent:>18} {spread:>8}")
    return "\n".join(lines)


def picture(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Plot the held-out loss of each row by update, the mean over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for row, runs in results.items():
        means = [statistics.mean(values) for values in zip(*(one["curve"].values() for one in runs), strict=True)]
        axes.plot(list(runs[0]["curve"]), means, marker=".", label=row)
    axes.set(xlabel="update", ylabel="held-out loss, nats a token")
    axes.legend()
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str]) -> None:
    """Train every row and print; `islands` is a benchmark of its own."""
    if arguments and arguments[0] == "islands":
        islands.main(arguments[1:])
        return
    parser = bench_parser("lowcomm", __doc__)
    parser.add_argument("--size", choices=SIZES, default="1m")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--every", type=int, default=10, help="updates between outer steps; NoLoCo: half")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of the inner optimizer, in all rows")
    parser.add_argument(
        "--outer", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every row's section outer"
    )
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--directory", type=Path, default=Path("."), help="where runs/ is made")
    parser.add_argument("--picture", type=Path, help="write the curves as an image")
    options = parser.parse_args(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for row in options.only:
        for seed in range(options.seeds):
            overrides = row_overrides(row, seed=seed, options=options)
            result = measure(overrides, name=f"{options.size}-{row}-{seed}", directory=options.directory)
            results.setdefault(row, []).append(result)
            print(f"{row} seed {seed}: {json.dumps(result)}", flush=True)
    print(table(results))
    if options.picture:
        picture(results, options.picture)
