"""A run directory as a small real run leaves it behind: two sessions, 200 steps, eight devices, made-up numbers."""

import json
import math
import random
from pathlib import Path

import pytest

CONFIG = """\
name: quickstart
steps: 200
model: {family: llama, vocab: 2048, layers: 4, embed: 192, heads: 6, kv_heads: 2, mlp: 512}
mesh: {data: 2, fsdp: 2, tensor: 2, platform: cpu, devices: 8}
"""

WEIGHTS = {
    "embed/embedding": ((2048, 192), ["tensor", "fsdp"]),
    "final_norm/scale": ((192,), [None]),
    "head/kernel": ((192, 2048), ["fsdp", "tensor"]),
}
LAYER = {
    "attn_norm/scale": ((192,), [None]),
    "attn/q/kernel": ((192, 6, 32), ["fsdp", "tensor", None]),
    "attn/k/kernel": ((192, 2, 32), ["fsdp", "tensor", None]),
    "attn/v/kernel": ((192, 2, 32), ["fsdp", "tensor", None]),
    "attn/o/kernel": ((6, 32, 192), ["tensor", None, "fsdp"]),
    "mlp_norm/scale": ((192,), [None]),
    "mlp/gate/kernel": ((192, 512), ["fsdp", "tensor"]),
    "mlp/up/kernel": ((192, 512), ["fsdp", "tensor"]),
    "mlp/down/kernel": ((512, 192), ["tensor", "fsdp"]),
}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A directory with every file of a finished run."""
    return run_directory(tmp_path)


def run_directory(root: Path) -> Path:
    """Write the files under `root`/quickstart."""
    directory = root / "quickstart"
    directory.mkdir()
    (directory / "config.yaml").write_text(CONFIG)
    (directory / "plan.json").write_text(json.dumps(plan()))
    (directory / "environment.json").write_text(json.dumps(environment()))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics()))
    (directory / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in events()))
    return directory


def plan() -> dict:
    """plan.json."""
    layers = {f"layers/{n}/{name}": entry for n in range(4) for name, entry in LAYER.items()}
    weights = {f"params/{name}": entry for name, entry in {**WEIGHTS, **layers}.items()}
    moments = {f"opt_state/adamw/mu/{name.removeprefix('params/')}": entry for name, entry in weights.items()}
    arrays = [array(name, *entry) for name, entry in {**weights, **moments}.items()]
    count = sum(math.prod(shape) for shape, _ in weights.values())
    per_device = sum(entry["bytes_per_device"] for entry in arrays[: len(weights)])
    return {
        "parameters": {"count": count, "bytes": 4 * count, "bytes_per_device": per_device},
        "optimizer": {"bytes": 8 * count, "bytes_per_device": 2 * per_device},
        "compiled": {
            "argument_bytes": 3 * per_device + 40_960,
            "output_bytes": 3 * per_device + 64,
            "temporary_bytes": 21_400_000,
            "alias_bytes": 3 * per_device,
            "peak_bytes": 3 * per_device + 21_500_000,
            "flops_per_step": 6.1e10,
        },
        "collectives": {
            "all-gather": {"fsdp": 6_100_000, "tensor": 9_800_000},
            "reduce-scatter": {"fsdp": 3_000_000, "tensor": 4_700_000},
            "all-reduce": {"data+fsdp": 180_000, "data": 5_900_000, "tensor": 310_000},
        },
        "arrays": arrays,
        "mesh": {"replica": 1, "pipe": 1, "data": 2, "fsdp": 2, "expert": 1, "seq": 1, "tensor": 2},
        "devices": [{"id": n, "kind": "cpu", "platform": "cpu", "process": n // 4} for n in range(8)],
        "model_flops_per_token": 1.5e7,
    }


def array(name: str, shape: tuple[int, ...], spec: list) -> dict:
    """One entry of plan.json's arrays."""
    shards = 2 ** sum(axis is not None for axis in spec)
    size = 4 * math.prod(shape) // shards
    return {"name": name, "shape": shape, "dtype": "float32", "spec": spec, "bytes_per_device": size}


def environment() -> dict:
    """environment.json."""
    return {
        "versions": {"meshwright": "0.1.0", "jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "optax": "0.2.8"},
        "python": "3.11.7",
        "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
        "devices": [f"cpu {n}" for n in range(8)],
        "processes": 2,
        "corpus": {
            "fingerprint": "9d1c6f20b7a4e835",
            "documents": 1650,
            "tokens": 7_912_004,
            "held_out_bytes": 601_233,
            "gzip_bits_per_byte": 2.1034,
        },
        "tokenizer": {"vocab": 2048, "fingerprint": "51be07cc1a90d2f4"},
    }


def metrics() -> list[dict]:
    """metrics.jsonl: every fifth step, held out every fiftieth in a row of its own."""
    noise = random.Random(0)
    rows = []
    for step in [1, *range(5, 201, 5)]:
        seconds = 1.31 + noise.gauss(0, 0.03) + (2.0 if step == 1 else 0)
        rate = 3e-3 * min(step / 20, 0.55 + 0.45 * math.cos(math.pi * step / 200))
        row = {"step": step, "loss": 2.6 + 5.0 * math.exp(-step / 45) + noise.gauss(0, 0.06), "tokens": 4096}
        row |= {"tokens_per_second": 4096 / seconds, "step_seconds": seconds, "host_seconds": 0.009 * seconds}
        row |= {"learning_rate": rate, "grad_norm": 0.35 + 3 * math.exp(-step / 12) + abs(noise.gauss(0, 0.05))}
        rows.append(row | {"mfu": 0.93 / seconds, "skipped": 0.0})
        if step % 50 == 0:
            loss = 2.7 + 5.0 * math.exp(-step / 45)
            bits = loss / math.log(2) / 3.05
            rows.append({"step": step, "held_out_loss": loss, "held_out_perplexity": math.exp(loss)})
            rows[-1]["held_out_bits_per_byte"] = bits
    return rows


def events() -> list[dict]:
    """events.jsonl: killed after step 120, restored at 100."""
    zero = 1_760_000_000.0
    entries = [
        (0.0, "start", {"step": 0}),
        (19.4, "compile", {"seconds": 19.37}),
        (88.0, "save", {"step": 50, "stall_seconds": 0.012}),
        (88.4, "commit", {"step": 50}),
        (90.1, "evaluation", {"step": 50, "seconds": 1.9, "held_out_loss": 4.346}),
        (155.0, "save", {"step": 100, "stall_seconds": 0.011}),
        (155.3, "commit", {"step": 100}),
        (157.0, "evaluation", {"step": 100, "seconds": 1.8, "held_out_loss": 3.242}),
        (157.9, "sample", {"step": 100, "prompt": "def ", "text": "get(self, name):\n    return self.name(self)\n"}),
        (183.0, "failure", {"error": "ValueError", "message": "Gloo all-reduce failed: connection closed by peer"}),
        (203.0, "restore", {"step": 100, "level": "storage", "reason": "newest whole checkpoint"}),
        (206.2, "compile", {"seconds": 3.1}),
        (214.0, "skip", {"step": 104, "loss": "NaN", "grad_norm": "Infinity"}),
        (272.0, "save", {"step": 150, "stall_seconds": 0.012}),
        (272.4, "commit", {"step": 150}),
        (340.0, "save", {"step": 200, "stall_seconds": 0.012}),
        (341.9, "evaluation", {"step": 200, "seconds": 1.9, "held_out_loss": 2.759}),
        (342.8, "sample", {"step": 200, "prompt": "def ", "text": "__init__(self, name, value=None):\n    pass\n"}),
        (343.1, "sample", {"step": 200, "prompt": "import os\n\nclass ", "text": "TestCase(unittest.TestCase):\n"}),
        (343.4, "commit", {"step": 200}),
        (343.5, "finish", {"step": 200, "loss": 2.66}),
    ]
    return [{"time": zero + seconds, "event": event, **fields} for seconds, event, fields in entries]
