"""`meshwright bench step`: tokens per second of one Llama here and in transformers + PyTorch, in one process.

Both have the same shapes, batch, float32, AdamW and cores, and take turns; the ratio is ours over theirs. Model FLOPs
are compared with the rate of a large matrix product, measured in turns too. The peer needs the extra `interop`.

    meshwright bench step                          34M parameters, 8 x 512 tokens, CPU
    meshwright bench step --model 1b --platform gpu    Llama 1B, bf16, sequence 4096, one GPU
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from meshwright.benchmarks.harness import bench_parser, median_ratio, run_in_turns
from meshwright.configs.adapter_runs import adapter_rows
from meshwright.configs.loader import apply_overrides, merge_trees, validate_tree
from meshwright.configs.names import ADAPTER_IDS_FIELD
from meshwright.configs.run import RunConfig

# Size -> sections of the configuration.
SIZES: dict[str, dict[str, Any]] = {
    "34m": {
        "model": {"vocab": 8192, "layers": 8, "embed": 512, "heads": 8, "mlp": 1408, "scan": False},
        "data": {"sequence_length": 512, "global_batch": 8},
    },
    "1b": {
        "model": {"vocab": 128256, "layers": 16, "embed": 2048, "heads": 32, "kv_heads": 8, "mlp": 8192, "scan": False}
        | {"tied_embeddings": True, "rope": {"theta": 500000.0}},
        "data": {"sequence_length": 4096, "global_batch": 4},
        "precision": {"compute": "bfloat16"},
        "memory": {"policy": "none", "loss_chunks": 4},
    },
}


def configuration(size: str, platform: str, overrides: dict[str, Any]) -> RunConfig:
    """The configuration of a run of `size`, which `overrides` change."""
    base = {
        "steps": 1000,
        "mesh": {"platform": platform, "devices": 1},
        "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.1, "schedule": "constant"},
        "data": {"source": "synthetic", "tokenizer": {"bytes": True}},
    }
    return validate_tree(merge_trees(merge_trees(base, SIZES[size]), overrides))


class TimedStep:
    """A compiled training step with a state and a batch. `memory` is that of its device in bytes."""

    def __init__(self, config: RunConfig) -> None:
        import jax

        from meshwright.parallel.mesh import make_mesh
        from meshwright.train.engine.host_data import make_global_arrays
        from meshwright.train.engine.program import build
        from meshwright.train.plan.compile_plan import memory

        self.program = build(config, make_mesh(config.mesh))
        began = time.perf_counter()
        self._step, self._wait = self.program.compiled_step(), jax.block_until_ready
        self.compile_seconds = time.perf_counter() - began
        self.memory = memory(self._step)
        self.batch = make_global_arrays(random_rows(config), config, self.program.mesh)
        self.state = self.program.initialize()

    def run(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Do a step and return its seconds, by `clock`."""
        began = clock()
        self.state, metrics = self._step(self.state, self.batch)
        self._wait((self.state, metrics))
        return clock() - began


def random_rows(config: RunConfig) -> dict[str, Any]:
    """A batch of random tokens, each row one document."""
    import numpy as np

    shape = (config.data.global_batch, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape, dtype=np.int32)
    adapters = np.repeat(
        np.arange(max(len(config.adapters), 1), dtype=np.int32), list(adapter_rows(config).values()) or shape[0]
    )
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        ADAPTER_IDS_FIELD: np.broadcast_to(adapters[:, None], shape),
    }


def make_peer(config: RunConfig) -> Callable[[], float]:
    """Return a function that does a step of the same model in transformers + PyTorch and returns its seconds."""
    import torch

    from meshwright.benchmarks.finetune_peer import make_llama, make_step

    model, sequence = config.model, config.data.sequence_length
    device = "cuda" if config.mesh.platform == "gpu" else "cpu"
    sizes = {name: getattr(model, name) for name in ("vocab", "embed", "mlp", "layers", "heads")}
    sizes |= {"kv_heads": model.key_value_heads, "tied": model.tied_embeddings, "sequence": sequence}
    peer = make_llama(sizes).to(device)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    if device == "cuda":
        peer = torch.compile(peer)
    tokens = torch.randint(0, model.vocab, (config.data.global_batch, sequence), device=device)
    half = config.precision.compute == "bfloat16"
    return make_step(peer, optimizer, tokens, lambda: torch.autocast(device, dtype=torch.bfloat16, enabled=half))


def measure(config: RunConfig, *, rounds: int, peer: bool) -> dict[str, Any]:
    """Rates and ratios of our step, the peer's and a matrix product, medians of `rounds` in turns."""
    from meshwright.models.flops import flops_per_token
    from meshwright.train.metrics.throughput import measure_matmul

    size = 2048 if config.mesh.platform == "cpu" else 8192
    runs = {"ours": TimedStep(config).run} | ({"theirs": make_peer(config)} if peer else {})
    runs["matmul"] = lambda: measure_matmul(size, dtype=config.precision.compute)
    seconds = run_in_turns(runs, rounds=rounds, warmup_rounds=2)
    matmul = statistics.median(seconds.pop("matmul"))
    tokens = config.data.global_batch * config.data.sequence_length
    median = {name: statistics.median(values) for name, values in seconds.items()}
    flops = flops_per_token(config.model, config.data.sequence_length) * tokens / median["ours"]
    result = {
        "tokens_per_second": {name: tokens / value for name, value in median.items()},
        "matmul_gflops": matmul / 1e9,
        "model_gflops": flops / 1e9,
        "model_over_matmul": flops / matmul,
    }
    if peer:
        result["ratio"] = median_ratio(seconds["theirs"], seconds["ours"])
    return result


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print."""
    parser = bench_parser("step", __doc__)
    parser.add_argument("--model", choices=SIZES, default="34m")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-peer", action="store_true", help="measure only ours and the matrix product")
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value")
    options = parser.parse_args(arguments)
    from meshwright.parallel.mesh import prepare_devices

    config = configuration(options.model, options.platform, apply_overrides({}, options.set))
    prepare_devices(config.mesh)
    print(json.dumps(measure(config, rounds=options.rounds, peer=not options.no_peer), indent=1))
