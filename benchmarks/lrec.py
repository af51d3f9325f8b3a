"""`meshwright bench lrec`: how much of the loss caused by quantization an adapter trained by recipe `lrec` recovers.

    meshwright train quickstart && meshwright checkpoint export runs/quickstart base
    meshwright bench lrec base
    meshwright bench lrec base --set quantization.format=int2 --set adapter.rank=32

It measures the held-out loss of the full model, of the quantized one, and of that with its adapter after training on
the quickstart's data. recovered = (quantized - repaired) / (quantized - full).
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshwright.benchmarks.harness import bench_parser
from meshwright.configs.loader import apply_overrides, find_config, merge_trees, read_tree, validate_tree

REPAIR: dict[str, Any] = {
    "name": "lrec",
    "steps": 200,
    "mesh": {"platform": "cpu", "devices": 1},
    "quantization": {"format": "int3"},
    "adapter": {"rank": 16},
    "recipe": {"name": "lrec"},
    "optimizer": {"name": "adamw", "learning_rate": 1.0e-3, "schedule": "cosine", "warmup_steps": 10, "clip": 1.0},
    "evaluation": {"every": 0, "prompts": []},
    "checkpoint": {"every": 0},
    "logging": {"every": 20, "tensorboard": False},
}


def held_out_loss(tree: dict[str, Any]) -> float:
    """The held-out loss of the run that `tree` describes, before its first step."""
    from meshwright.parallel.mesh import make_mesh
    from meshwright.train.data import assemble
    from meshwright.train.engine.program import build
    from meshwright.train.infer.evaluation import evaluate

    config = validate_tree(tree)
    program = build(config, make_mesh(config.mesh))
    state = program.initialize()
    data = assemble.build_data(config.data, seed=config.seed, model_vocab=config.model.vocab)
    return evaluate(program, program.compiled_evaluation(), state.params, state.frozen, data)["held_out_loss"]


def measure(tree: dict[str, Any]) -> dict[str, float]:
    """The three losses, the recovered share, and the bytes of the adapter and the base."""
    from meshwright.parallel.mesh import make_mesh, prepare_devices
    from meshwright.train.core.process_env import ProcessInfo
    from meshwright.train.engine.program import build
    from meshwright.train.plan.compile_plan import storage_plan
    from meshwright.train.run import train

    config = validate_tree(tree)
    prepare_devices(config.mesh)
    full = held_out_loss(tree | {"quantization": None, "adapter": None, "recipe": {"name": "pretrain"}})
    quantized = held_out_loss(tree)
    with tempfile.TemporaryDirectory() as root:
        repaired = train(config, process_info=ProcessInfo(), root=Path(root)).metrics["held_out_loss"]
    arrays = storage_plan(build(config, make_mesh(config.mesh)))["arrays"]
    sizes = {array["name"]: array["bytes_per_device"] for array in arrays}
    codes = sum(size for name, size in sizes.items() if name.startswith("frozen/") and "/kernel/" in name)
    adapter = sum(size for name, size in sizes.items() if name.startswith("params/"))
    return {
        "full": full,
        "quantized": quantized,
        "repaired": repaired,
        "recovered": (quantized - repaired) / (quantized - full),
        "quantized_kernel_bytes": codes,
        "adapter_bytes": adapter,
    }


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    parser = bench_parser("lrec", __doc__)
    parser.add_argument("base", help="a model directory, e.g. made by `meshwright checkpoint export`")
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value")
    options = parser.parse_args(arguments)
    data = read_tree(find_config("quickstart"))["data"]
    sections = {"model": {"from": options.base}, "data": {key: data[key] for key in data if key != "tokenizer"}}
    tree = apply_overrides(merge_trees(REPAIR, sections), options.set)
    print(json.dumps(measure(tree), indent=1))
