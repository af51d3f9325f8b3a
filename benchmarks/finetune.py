"""`meshwright bench finetune`: what fine-tuning costs beside full training and beside PEFT + PyTorch on the same cores.

    meshwright bench finetune --peer PYTHON        an interpreter that has torch, transformers and peft
    meshwright bench finetune --methods lora sparse --size small
    meshwright bench finetune --methods lora several ragged alone
    meshwright bench finetune --methods adapters --size quickstart       every adapter.method

One step of each method on one model and batch, in turns with a step of the peer, medians; float32, AdamW, one device.
`speed` is full training's seconds over the method's; `peak_bytes` and `temporary_bytes` (activations and gradients) are
the compiler's analysis of the step; `ratio` is PEFT's LoRA seconds over ours. `sparse` trains the last quarter of the
layers. Neither recomputes anything. `several` trains four LoRAs in one step, each on a quarter of the rows, `ragged`
the same with `adapter.product: ragged`; `alone` is one of them on its quarter by itself, and `together` is the seconds
of four such steps over those of the one.
"""

import argparse
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from meshwright.benchmarks.step import TimedStep, configuration
from meshwright.configs.loader import find_config, merge_trees, read_tree
from meshwright.configs.run import RunConfig
from meshwright.configs.sections.adapter import METHOD_KEYS

QUICKSTART = read_tree(find_config("quickstart"))
# What `configuration` is told on top of its 34M parameters.
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
# What a run of these methods has to say besides.
TOLD: dict[str, dict[str, Any]] = {
    "vera": {"adapter": {"rank": 256}},
    "tokens": {"adapter": {"tokens": [7]}},
    "bitfit": {"model": {"family": "qwen2"}},
    "selective": {"adapter": {"targets": ["layers/*"]}},
}


def methods(layers: int, rank: int, batch: int) -> dict[str, dict[str, Any]]:
    """Name -> what a run of it says."""
    lora = {"method": "lora", "rank": rank}
    each = {f"number{number}": {} for number in range(SEVERAL)}
    ranked = {name: {"rank": rank} if "rank" in keys else {} for name, keys in METHOD_KEYS.items()}
    alike = {
        name: merge_trees({"adapter": {"method": name} | ranked[name]}, TOLD.get(name, {})) for name in METHOD_KEYS
    }
    return alike | {
        "full": {},
        "lora": {"adapter": lora},
        "several": {"adapter": lora, "adapters": each},
        "ragged": {"adapter": lora | {"product": "ragged"}, "adapters": each},
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
    """A function that has the peer make one step and returns its seconds."""
    model = config.model
    sizes = {
        "vocab": model.vocab, "embed": model.embed, "mlp": model.mlp, "layers": model.layers, "heads": model.heads,
        "batch": config.data.global_batch, "sequence": config.data.sequence_length, "rank": config.adapter.rank,
        "threads": len(os.sched_getaffinity(0)),
    }  # fmt: skip
    script = Path(__file__).with_name("finetune_peer.py")
    process = stack.enter_context(
        subprocess.Popen(
            [python, str(script), json.dumps(sizes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    )
    stack.callback(process.stdin.close)

    def step() -> float:
        process.stdin.write("step\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    return step


def measure(configs: dict[str, RunConfig], *, rounds: int, python: str | None) -> dict[str, Any]:
    """Median seconds of every method in turns, its memory, and the ratios."""
    with ExitStack() as stack:
        made = {name: TimedStep(config) for name, config in configs.items()}
        runs: dict[str, Callable[[], float]] = {name: one.run for name, one in made.items()}
        if python:
            runs["peft"] = peer(configs["lora"], python, stack)
        for run in runs.values():  # compilation and warm-up
            run(), run()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(run())
    whole = configs["full"].data.global_batch
    rows = {name: configs[name].data.global_batch if name in configs else whole for name in runs}
    # Of as many rows: where a step has fewer, as many steps as make them up.
    even = {name: [whole / rows[name] * one for one in values] for name, values in seconds.items()}
    tokens = whole * configs["full"].data.sequence_length
    result: dict[str, Any] = {
        name: {"tokens_per_second": tokens / statistics.median(values), "speed": over(even["full"], values)}
        for name, values in even.items()
    }
    for name, one in made.items():
        result[name] |= {key: one.memory[key] for key in ("peak_bytes", "temporary_bytes", "argument_bytes")}
        if name in ("several", "ragged") and "alone" in even:
            result[name]["together"] = over(even["alone"], even[name])
    if python:
        result["ratio"] = over(seconds["peft"], seconds["lora"])
    return result


def over(one: list[float], other: list[float]) -> float:
    """The median of the ratios of turns."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="meshwright bench finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    usual = configuration("34m", "cpu", base)
    every = methods(usual.model.layers, options.rank, usual.data.global_batch)
    asked = [one for name in options.methods for one in (METHOD_KEYS if name == "adapters" else [name])]
    chosen = list(dict.fromkeys(["full", *asked]))
    if options.peer and "lora" not in chosen:
        chosen.append("lora")
    configs = {name: configuration("34m", "cpu", merge_trees(base, every[name])) for name in chosen}
    prepare_devices(configs["full"].mesh)
    print(json.dumps(measure(configs, rounds=options.rounds, python=options.peer), indent=1))
