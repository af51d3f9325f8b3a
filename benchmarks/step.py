"""`meshwright bench step`: tokens a second of one Llama here and in transformers + PyTorch, in one process.

Same shapes, batch, float32, AdamW and cores, in turns; the ratio is ours over theirs, and model FLOPs
are set against the rate of a large matrix product measured in between. Needs the extra `interop` for the peer.

    meshwright bench step                          34M parameters, 8 x 512 tokens, CPU
    meshwright bench step --model 1b --platform gpu    Llama 1B, bf16, sequence 4096, one GPU
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from meshwright.configs.adapter_runs import adapter_rows
from meshwright.configs.loader import merge_trees, validate_tree
from meshwright.configs.names import ADAPTER_IDS_FIELD
from meshwright.configs.run import RunConfig

# Sizes by name: what a configuration says of the model, the batch and the numbers.
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
    """The run that is timed."""
    base = {
        "steps": 1000,
        "mesh": {"platform": platform, "devices": 1},
        "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.1, "schedule": "constant"},
        "data": {"source": "synthetic", "tokenizer": {"bytes": True}},
    }
    return validate_tree(merge_trees(merge_trees(base, SIZES[size]), overrides))


class TimedStep:
    """One step here, compiled: `run()` makes it and returns its seconds, `memory` is what it needs on its device."""

    def __init__(self, config: RunConfig) -> None:
        import jax

        from meshwright.parallel.mesh import make_mesh
        from meshwright.train.engine.host_data import make_global_arrays
        from meshwright.train.engine.program import build
        from meshwright.train.plan.compile_plan import memory

        program = build(config, make_mesh(config.mesh))
        self._step, self._wait = program.compiled_step(), jax.block_until_ready
        self._batch = make_global_arrays(rows(config), config, program.mesh)
        self._state = program.initialize()
        self.memory = memory(self._step)  # bytes

    def run(self) -> float:
        """Seconds of a step."""
        began = time.perf_counter()
        self._state, metrics = self._step(self._state, self._batch)
        self._wait((self._state, metrics))
        return time.perf_counter() - began


def rows(config: RunConfig) -> dict[str, Any]:
    """A batch of words drawn at random, each row one document."""
    import numpy as np

    shape = (config.data.global_batch, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape, dtype=np.int32)
    own = np.repeat(
        np.arange(max(len(config.adapters), 1), dtype=np.int32), list(adapter_rows(config).values()) or shape[0]
    )
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "loss_weights": np.ones(shape, np.float32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        ADAPTER_IDS_FIELD: np.broadcast_to(own[:, None], shape),
    }


def theirs(config: RunConfig) -> Callable[[], float]:
    """A function that runs one step of the same model in transformers + PyTorch and returns its seconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = config.model
    device = "cuda" if config.mesh.platform == "gpu" else "cpu"
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab,
            hidden_size=model.embed,
            intermediate_size=model.mlp,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.key_value_heads,
            max_position_embeddings=config.data.sequence_length,
            tie_word_embeddings=model.tied_embeddings,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    if device == "cuda":
        peer = torch.compile(peer)
    tokens = torch.randint(0, model.vocab, (config.data.global_batch, config.data.sequence_length), device=device)
    half = config.precision.compute == "bfloat16"

    def run() -> float:
        began = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = peer(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began

    return run


def measure(config: RunConfig, *, rounds: int, peer: bool) -> dict[str, Any]:
    """Median seconds of `rounds` turns of us, them and a matrix product, and the ratios."""
    from meshwright.models.flops import flops_per_token
    from meshwright.train.metrics.throughput import measure_matmul

    runs = {"ours": TimedStep(config).run} | ({"theirs": theirs(config)} if peer else {})
    dtype = config.precision.compute
    size = 2048 if config.mesh.platform == "cpu" else 8192
    for run in runs.values():  # compilation and warm-up
        run(), run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rates = []
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run())
        rates.append(measure_matmul(size, dtype=dtype))
    tokens = config.data.global_batch * config.data.sequence_length
    median = {name: statistics.median(values) for name, values in seconds.items()}
    flops = flops_per_token(config.model, config.data.sequence_length) * tokens / median["ours"]
    result = {
        "tokens_per_second": {name: tokens / value for name, value in median.items()},
        "matmul_gflops": statistics.median(rates) / 1e9,
        "model_gflops": flops / 1e9,
        "model_over_matmul": flops / statistics.median(rates),
    }
    if peer:
        pairs = zip(seconds["theirs"], seconds["ours"], strict=True)
        result["ratio"] = statistics.median(their / our for their, our in pairs)
    return result


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="meshwright bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SIZES, default="34m")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-peer", action="store_true", help="only us and the matrix product")
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value")
    options = parser.parse_args(arguments)
    from meshwright.configs.loader import nest_value, parse_yaml
    from meshwright.parallel.mesh import prepare_devices

    overrides: dict[str, Any] = {}
    for word in options.set:
        key, _, value = word.partition("=")
        overrides = merge_trees(overrides, nest_value(key.split("."), parse_yaml(value, origin=word)))
    config = configuration(options.model, options.platform, overrides)
    prepare_devices(config.mesh)
    print(json.dumps(measure(config, rounds=options.rounds, peer=not options.no_peer), indent=1))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
