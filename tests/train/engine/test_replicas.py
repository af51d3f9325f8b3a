"""Replicas on the mesh: no message between them but at meetings, the same run on every mesh, and what it is called."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import assert_same, batches, initial_state, tiny

from meshwright.configs.sections.outer import PAIRWISE_RULES, RULES
from meshwright.parallel.hlo.collectives import collectives
from meshwright.parallel.layout import from_canonical_replicas, to_canonical_replicas
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.program import build

OUTERS = {name: {"name": name, "every": 2} for name in RULES} | {
    "diloco-int8": {"name": "diloco", "every": 2, "wire": "int8"},
    "streaming": {"name": "streaming", "every": 3, "fragments": 3, "wire": "e3m0"},
    "noloco": {"name": "noloco", "every": 2, "wire": "bf16"},
    "local-sgd": {"name": "local-sgd", "every": 2, "wire": "fp8"},
}
MESH = {"replica": 2, "fsdp": 2, "tensor": 2}
SGD = {"name": "sgd", "b1": 0.0, "learning_rate": 0.2, "clip": None, "schedule": "constant"}
DROPOUT = {"dropout": 0.1}


@functools.cache
def program_of(outer, **mesh):
    config = tiny(outer=OUTERS[outer], mesh=mesh, model=DROPOUT)
    return build(config, make_mesh(config.mesh))


@functools.cache
def compiled_step():
    return program_of("diloco", **MESH).compiled_step()


def crossing(compiled, mesh):
    """Kinds of the collectives between replicas."""
    return {one.kind for one in collectives(compiled.as_text(), mesh) if "replica" in one.axes}


def test_a_mesh_of_replicas_in_microbatches_equals_replicas_without_other_axes():
    outer = OUTERS["diloco"]
    small = tiny(outer=outer, mesh={"replica": 2}, optimizer=SGD)
    large = {"replica": 2, "seq": 2, "tensor": 2}
    assert_same(small, tiny(outer=outer, mesh=large, optimizer=SGD, microbatches=2), steps=3)


@pytest.mark.parametrize("outer", [pytest.param("noloco", marks=pytest.mark.slow), "streaming"])
def test_replicas_that_are_pipelines_equal_replicas_without_one(outer):
    """Stages of two layers and of one, so that a fragment's layers stand elsewhere, beside empty places."""
    base = {
        "outer": OUTERS[outer] | {"wire": "float32"},
        "optimizer": SGD,
        "microbatches": 2,
        "model": {"layers": 6},
    }
    staged = tiny(**base, mesh={"replica": 2, "pipe": 2, "fsdp": 2}, pipeline={"schedule": "zb-v"})
    assert_same(tiny(**base, mesh={"replica": 2}), staged, steps=4)


@pytest.mark.parametrize("pipeline", [{"schedule": "zb-v"}, {"schedule": "1f1b", "vocab_parallel": 2}])
def test_no_inner_step_of_a_pipeline_sends_anything_to_another_replica(pipeline):
    mesh = {"replica": 2, "pipe": 2, "fsdp": 2}
    config = tiny(
        outer=OUTERS["noloco"], optimizer=SGD, microbatches=2, model={"layers": 4}, mesh=mesh, pipeline=pipeline
    )
    program = build(config, make_mesh(config.mesh))
    compiled = program.compiled_step()
    assert collectives(compiled.as_text(), program.mesh) and not crossing(compiled, program.mesh)


@pytest.mark.slow
def test_routed_microbatches_and_their_dropout_are_the_same_on_every_mesh():
    """`test_replica_routing.py` has the path itself; no meeting hides what one stage makes."""
    base = {
        "outer": {"name": "noloco", "every": 3, "routing": True},
        "optimizer": SGD,
        "microbatches": 2,
        "model": {"layers": 4} | DROPOUT,
        "pipeline": {"schedule": "zb-v"},
    }
    small, large = ({"replica": 2, "pipe": 2} | more for more in ({}, {"fsdp": 2}))
    assert_same(tiny(**base, mesh=small), tiny(**base, mesh=large), steps=2)
    unrouted = tiny(**base | {"outer": base["outer"] | {"routing": False}}, mesh=small)
    with pytest.raises(AssertionError, match="grad_norm of step 0"):  # of each replica; equal ones have equal losses
        assert_same(tiny(**base, mesh=small), unrouted, steps=2)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "tensor": 2}, {"seq": 2, "data": 2}])
def test_no_inner_step_sends_anything_to_another_replica(axes):
    program = program_of("diloco", replica=2, **axes)
    compiled = compiled_step() if "fsdp" in axes else program.compiled_step()
    assert collectives(compiled.as_text(), program.mesh) and not crossing(compiled, program.mesh)


@pytest.mark.parametrize("outer", OUTERS)
def test_outer_steps_on_a_mesh_equal_those_on_one_device(outer):
    """From one random state. On the mesh a mean is an all-gather or all-reduce, and pairs use only permutes."""
    wide, narrow = (program_of(outer, replica=4, **axes) for axes in ({"tensor": 2}, {}))
    single = build(narrow.config, make_mesh(narrow.config.mesh.model_copy(update={"replica": 1})), replica_count=4)
    random = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), single.shapes)
    states = [jax.device_put(drawn, program.shardings, may_alias=False) for program in (single, wide)]
    synchronizes = [program.compiled_synchronization() for program in (single, wide)]
    for update in range(1, 8):
        states = [synchronize(state, update) for synchronize, state in zip(synchronizes, states, strict=True)]
    for expected, found in zip(jax.tree.leaves(states[0]), jax.tree.leaves(states[1]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    kinds = set().union(*(crossing(one, wide.mesh) for one in programs(wide)))
    paired = outer in PAIRWISE_RULES
    wire = OUTERS[outer].get("wire", "float32")
    assert kinds == {"collective-permute" if paired else "all-reduce" if wire == "float32" else "all-gather"}


TWENTY_OUTER_STEPS = """
import sys
import jax
import numpy as np
from test_replicas import after_twenty_outer_steps

loaded = []
jax.monitoring.register_event_listener(lambda event, **_: loaded.append("cache_hit" in event))
np.savez(sys.argv[1], *map(np.asarray, after_twenty_outer_steps(sys.argv[2])), loaded=any(loaded))
"""


def test_outer_steps_from_the_compilation_cache_equal_compiled_ones(tmp_path):
    """In processes of their own: messages in another order on every device, as XLA:CPU had them, end the process."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    place = os.environ | cache | {"PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)])}
    for name in ("compiled", "loaded"):
        subprocess.run(
            [sys.executable, "-c", TWENTY_OUTER_STEPS, tmp_path / f"{name}.npz", "noloco"], env=place, check=True
        )
    compiled, loaded = (np.load(tmp_path / f"{name}.npz") for name in ("compiled", "loaded"))
    assert not compiled["loaded"] and loaded["loaded"]
    for name in set(compiled.files) - {"loaded"}:
        np.testing.assert_array_equal(compiled[name], loaded[name])


def after_twenty_outer_steps(outer):
    """A random state of four replicas after twenty outer steps."""
    program = program_of(outer, replica=4)
    random = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype), program.shapes)
    state = jax.device_put(drawn, program.shardings, may_alias=False)
    synchronize = program.compiled_synchronization()
    for update in range(2, 42, 2):
        state = synchronize(state, update)
    return jax.tree.leaves((state.params, state.outer))


def programs(program):
    """The compiled outer steps, without those that only use what has arrived."""
    replicas = program.replicas
    sending = [outer_step for outer_step in replicas.outer.outer_steps if not outer_step.name.startswith("receive")]
    return [replicas.compile_outer_step(outer_step, program.shapes, program.shardings) for outer_step in sending]


def test_an_outer_step_after_every_step_without_momentum_is_data_parallel_sgd():
    """One fragment, outer learning rate 1: the mean of the replicas' SGD steps is the step of the mean gradient.

    Sums are in another order, whose rounding differs by processor: 5e-6 after three steps on one of them.
    """
    always = {"name": "streaming", "every": 1, "fragments": 1, "overlap": 0, "mix": 0, "learning_rate": 1}
    together = tiny(optimizer=SGD, mesh={"replica": 4}, outer=always | {"momentum": 0}, model=DROPOUT)
    alone = tiny(optimizer=SGD, mesh={"data": 4}, model=DROPOUT)
    rows = [batch | {"loss_weights": np.ones_like(batch["loss_weights"])} for batch in batches(alone, 3)]
    for expected, found in zip(stepped(alone, rows), stepped(together, rows), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), expected, found)


def stepped(config, rows):
    """The evaluation parameters after each of `rows`, which are batches."""
    program = build(config, make_mesh(config.mesh))
    state = jax.device_put(initial_state(config), program.shardings, may_alias=False)
    step, synchronize, params = program.compiled_step(), program.compiled_synchronization(), []
    for number, batch in enumerate(rows, 1):
        state, _ = step(state, make_global_arrays(batch, config, program.mesh))
        state = synchronize(state, number)
        params.append(jax.device_get(program.eval_params(state)))
    return params


def test_a_replica_that_is_not_finite_keeps_its_parameters_until_the_outer_step():
    program = program_of("diloco", **MESH)
    config, before = program.config, initial_state(program.config)
    batch = batches(config, 1)[0]
    batch["loss_weights"][4:] *= np.nan  # the second replica's rows
    state = jax.device_put(before, program.shardings, may_alias=False)
    after, metrics = compiled_step()(state, make_global_arrays(batch, config, program.mesh))
    assert metrics["skipped"].tolist() == [False, True]
    kernel = lambda state: np.asarray(state.params["head"]["kernel"])
    assert [np.array_equal(*pair) for pair in zip(kernel(before), kernel(after), strict=True)] == [False, True]
    met = kernel(program.compiled_synchronization()(after, 2))
    assert np.isfinite(met).all() and np.array_equal(met[0], met[1])


def test_canonical_names_name_the_replica_and_map_back():
    for outer, name in (("noloco", "replica/1/outer/anchor"), ("diloco", "outer/anchor")):
        program = program_of(outer, replica=2)
        model = program.config.model
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), program.shapes)
        names = program.replicas.canonical(zeros, model)
        assert names[f"{name}/layers/1/attn/q/kernel"].shape == (16, 4, 4)
        assert names["replica/1/opt_state/adamw/mu/layers/0/attn/q/kernel"].shape == (16, 4, 4)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype("f"), program.shapes.params)
    params["head"]["kernel"][..., 61:] = 0  # padding has no canonical place
    params["embed"]["embedding"][:, 61:] = 0
    back = from_canonical_replicas(to_canonical_replicas(params, model, replicas=2), params, model, replicas=2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, back)
