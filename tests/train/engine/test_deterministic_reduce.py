"""One order of additions on every mesh: parameters are equal bit for bit, and equal the plain sums to rounding."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import assert_same, tiny, trajectory

from meshwright.checkpoint import manifest
from meshwright.configs.sections.fault_tolerance import ElasticConfig
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine import deterministic_reduce
from meshwright.train.engine.deterministic_reduce import tree_accumulate, tree_sum
from meshwright.train.engine.program import build
from meshwright.train.plan.compile_plan import step_flops

ELASTIC = {"deterministic": True}


def state_of(devices, **changes):
    """Losses and the canonical state after three steps of four microbatches on `devices`."""
    seen, state = trajectory(tiny(mesh={"data": devices}, microbatches=4, elastic=ELASTIC, **changes), steps=3)
    return [float(metrics["loss"]) for metrics in seen], state


def differing(a, b):
    return [name for name in a if not np.array_equal(a[name], b[name])]


DROPOUT = {"model": {"dropout": 0.2, "scan": False}, "memory": {"policy": "full"}}


@pytest.mark.parametrize(("fewer", "changes"), [(2, {}), (1, {}), (1, DROPOUT)])
def test_four_devices_and_fewer_give_the_same_bits(fewer, changes):
    (losses, whole), (others, state) = state_of(4, **changes), state_of(fewer, **changes)
    assert others == losses and not differing(whole, state)


def test_the_tree_adds_up_to_the_plain_gradient():
    assert_same(tiny(), tiny(microbatches=4, mesh={"data": 2}, elastic=ELASTIC))


def test_the_plan_counts_the_rounds_of_the_loop():
    config = tiny(mesh={"data": 2}, microbatches=8, elastic=ELASTIC)
    mesh = make_mesh(config.mesh)
    plain = config.model_copy(update={"microbatches": 1, "elastic": ElasticConfig()})
    assert step_flops(build(config, mesh)) == step_flops(build(plain, mesh))


def numpy_tree_sum(values):
    """The tree of the module's docstring, in NumPy."""
    while len(values) > 1:
        values = [values[i] + values[i + 1] if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7, 8, 11])
def test_a_device_and_devices_add_in_the_same_tree(count):
    values = np.random.default_rng(count).normal(size=(count, 50)).astype(np.float32)
    local = jax.jit(lambda parts: tree_accumulate(lambda part: part, parts, count=count))(jnp.asarray(values))
    np.testing.assert_array_equal(local, numpy_tree_sum(list(values)))
    np.testing.assert_array_equal(tree_sum([jnp.asarray(one) for one in values]), numpy_tree_sum(list(values)))


def test_another_order_of_additions_changes_the_bits(monkeypatch):
    """The test of the bits can fail: here devices' sums are added from left to right."""
    monkeypatch.setattr(deterministic_reduce, "tree_sum", lambda nodes: sum(nodes[1:], nodes[0]))
    assert differing(state_of(1)[1], state_of(4, name="from-left-to-right")[1])


SMALL = (
    "steps=20", "microbatches=4", "elastic.deterministic=true", "optimizer={name: adamw, clip: null, warmup_steps: 0}",
    "model={layers: 1, embed: 32, heads: 2, kv_heads: 2, mlp: 32, vocab: 384}", "data.source=synthetic",
    "data.tokenizer={bytes: true, train: null, vocab: null}", "data.held_out=0", "data.sequence_length=32",
    "data.global_batch=8", "evaluation.prompts=[]", "logging.tensorboard=false", "checkpoint.every=20",
)  # fmt: skip


@pytest.mark.slow
def test_a_device_of_one_microbatch_computes_the_bits_of_a_device_of_two(tmp_path):
    """With all of the compiler's passes, which know what an index into one is."""
    environment, blocks = os.environ | {"XLA_FLAGS": "", "MESHWRIGHT_CACHE": str(tmp_path / "cache")}, []
    for devices in (4, 2):
        command = [sys.executable, "-m", "meshwright.train.cli", "train", "quickstart", *SMALL, f"name=on-{devices}"]
        command.append(f"mesh={{devices: {devices}, data: {devices}, fsdp: 1, tensor: 1}}")
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.DEVNULL)
        arrays = manifest.read(tmp_path / "runs" / f"on-{devices}" / "checkpoints" / "20").arrays
        blocks.append({name: one.blocks for name, one in arrays.items()})
    assert blocks[0] == blocks[1]
