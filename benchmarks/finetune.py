"""`meshwright bench finetune`: the cost of fine-tuning next to full training and to PEFT + PyTorch on the same cores.

    meshwright bench finetune --peer PYTHON        an interpreter with torch, transformers and peft
    meshwright bench finetune --methods lora sparse --size small
    meshwright bench finetune --methods lora several ragged alone
    meshwright bench finetune --methods adapters --size quickstart       every adapter.method

Steps of every method and of the peer take turns on one model and batch; float32, AdamW, one device, no recomputation.
Numbers are medians. `speed` is the seconds of full training over those of the method; `peak_bytes` and
`temporary_bytes` (activations and gradients) are the compiler's analysis of the step; `ratio` is the seconds of PEFT's
LoRA over ours. `sparse` trains the last quarter of the layers. `several` trains four LoRAs in one step, each on a
quarter of the rows; `ragged` does the same with `adapter.product: ragged`; `alone` trains one of them on its quarter,
and `together` is the seconds of four such steps over those of the one.
"""

import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from meshwright.benchmarks.harness import bench_parser, median_ratio, run_in_turns
from meshwright.benchmarks.step import TimedStep, configuration
from meshwright.configs.loader import find_config, merge_trees, read_tree
from meshwright.configs.run import RunConfig
from meshwright.configs.sections.adapter import METHOD_KEYS

QUICKSTART = read_tree(find_config("quickstart"))
# Size -> sections that differ from `configuration` of 34M parameters.
SIZES: dict[str, dict[str, Any]] = {
    "34m": {},
    "quickstart": {
        "model": QUICKSTART["model"],
        "data": {key: QUICKSTART["data"][key] for key in ("sequence_length", "global_batch")},
    },
    "small": {
        "model": {"vocab": 1024, "layers": 4, "embed": 128, "heads": 4, "mlp": 384},
        "data": {"sequence_length": 128, "global_batch": 4},
    },
}
SEVERAL = 4  # adapters that are trained together
# Method -> other sections that it needs.
METHOD_SECTIONS: dict[str, dict[str, Any]] = {
    "vera": {"adapter": {"rank": 256}},
    "tokens": {"adapter": {"tokens": [7]}},
    "bitfit": {"model": {"family": "qwen2"}},
    "selective": {"adapter": {"targets": ["layers/*"]}},
}


def methods(layers: int, rank: int, batch: int) -> dict[str, dict[str, Any]]:
    """Name -> sections of its configuration."""
    lora = {"method": "lora", "rank": rank}
    adapters = {f"number{number}": {} for number in range(SEVERAL)}
    ranks = {name: {"rank": rank} if "rank" in keys else {} for name, keys in METHOD_KEYS.items()}
    by_method = {
        name: merge_trees({"adapter": {"method": name} | ranks[name]}, METHOD_SECTIONS.get(name, {}))
        for name in METHOD_KEYS
    }
    return by_method | {
        "full": {},
        "lora": {"adapter": lora},
        "several": {"adapter": lora, "adapters": adapters},
        "ragged": {"adapter": lora | {"product": "ragged"}, "adapters": adapters},
        "alone": {"adapter": lora, "data": {"global_batch": batch // SEVERAL}},
        "qlora": {"adapter": {"method": "lora", "rank": rank}, "quantization": {"format": "nf4", "double": True}},
        "sparse": {"adapter": {"method": "selective", "layers": layers // 4}},
        "int8": {
            "adapter": {"method": "selective", "targets": ["layers/*"], "layers": layers // 4},
            "quantization": {"format": "int8", "trained": True},
            "optimizer": {"name": "sgd", "b1": 0.0},
        },
    }


def peer(config: RunConfig, python: str, stack: ExitStack) -> Callable[[], float]:
    """Return a function that lets the peer do a step and returns its seconds."""
    model = config.model
    sizes = {
        "vocab": model.vocab, "embed": model.embed, "mlp": model.mlp, "layers": model.layers, "heads": model.heads,
        "batch": config.data.global_batch, "sequence": config.data.sequence_length, "rank": config.adapter.rank,
        "threads": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    script = Path(__file__).with_name("finetune_peer.py")
    command = [python, str(script), json.dumps(sizes)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.enter_context(process)
    stack.callback(process.stdin.close)

    def step() -> float:
        process.stdin.write("step\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    return step


def measure(configs: dict[str, RunConfig], *, rounds: int, python: str | None) -> dict[str, Any]:
    """Medians of every method in turns, its memory, and ratios."""
    with ExitStack() as stack:
        steps = {name: TimedStep(config) for name, config in configs.items()}
        runs: dict[str, Callable[[], float]] = {name: step.run for name, step in steps.items()}
        if python:
            runs["peft"] = peer(configs["lora"], python, stack)
        seconds = run_in_turns(runs, rounds=rounds, warmup_rounds=2)
    batch = configs["full"].data.global_batch
    rows = {name: configs[name].data.global_batch if name in configs else batch for name in runs}
    # Seconds for the rows of a full batch, where a step has fewer.
    scaled = {name: [batch / rows[name] * value for value in values] for name, values in seconds.items()}
    tokens = batch * configs["full"].data.sequence_length
    result: dict[str, Any] = {
        name: {"tokens_per_second": tokens / statistics.median(values), "speed": median_ratio(scaled["full"], values)}
        for name, values in scaled.items()
    }
    for name, step in steps.items():
        result[name] |= {key: step.memory[key] for key in ("peak_bytes", "temporary_bytes", "argument_bytes")}
        if name in ("several", "ragged") and "alone" in scaled:
            result[name]["together"] = median_ratio(scaled["alone"], scaled[name])
    if python:
        result["ratio"] = median_ratio(seconds["peft"], seconds["lora"])
    return result


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print."""
    parser = bench_parser("finetune", __doc__)
    parser.add_argument("--size", choices=SIZES, default="34m")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=["adapters", *methods(4, 1, SEVERAL)],
        default=["full", "lora", "sparse", "qlora"],
        help="`adapters`: every adapter.method",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with torch, transformers and peft")
    options = parser.parse_args(arguments)
    from meshwright.parallel.mesh import prepare_devices

    base = SIZES[options.size]
    full = configuration("34m", "cpu", base)
    sections = methods(full.model.layers, options.rank, full.data.global_batch)
    names = ["full"]
    for name in options.methods:
        names += METHOD_KEYS if name == "adapters" else [name]
    if options.peer:
        names.append("lora")
    configs = {name: configuration("34m", "cpu", merge_trees(base, sections[name])) for name in dict.fromkeys(names)}
    prepare_devices(configs["full"].mesh)
    print(json.dumps(measure(configs, rounds=options.rounds, python=options.peer), indent=1))
