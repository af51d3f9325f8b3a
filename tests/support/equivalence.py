"""Equivalence is the method of proof: two configurations must give the same result.

    assert_same(tiny(), tiny(mesh={"data": 2, "tensor": 2}))

compares losses, gradient norms and the canonical state over a few steps on fixed random batches.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from meshwright.configs.loader import merge_trees, validate_tree
from meshwright.configs.run import RunConfig
from meshwright.configs.sections.outer import OuterConfig
from meshwright.configs.sections.parallel import MemoryConfig, MeshConfig, PipelineConfig
from meshwright.parallel.layout import reorder_layers, to_canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.state import TrainState
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.program import Program, build
from meshwright.train.engine.replicas import metrics_to_host

TINY = {
    "steps": 5,
    "model": {"vocab": 61, "vocab_multiple": 8, "layers": 2, "embed": 16, "heads": 4, "kv_heads": 2, "mlp": 24},
    "optimizer": {"learning_rate": 0.01, "clip": 1.0, "weight_decay": 0.1, "warmup_steps": 2},
    "data": {"source": "synthetic", "tokenizer": {"bytes": True}, "sequence_length": 16, "global_batch": 8},
    "mesh": {"platform": "cpu"},
}


def tiny(**changes: Any) -> RunConfig:
    """A two-layer run, with `changes` merged over it."""
    return validate_tree(merge_trees(TINY, changes))


def batches(config: RunConfig, steps: int) -> list[dict[str, np.ndarray]]:
    """Random packed batches with documents of uneven length, padding and uneven weights; the same for every mesh."""
    random, vocab = np.random.default_rng(0), config.model.vocab
    shape = (config.data.global_batch, config.data.sequence_length)
    packed = (random_packed_batch(random, shape, vocab=vocab) for _ in range(steps))
    return [with_extra_fields(batch, vocab=vocab, top_k=config.recipe.top_k or 1) for batch in packed]


def random_packed_batch(random: np.random.Generator, shape: tuple[int, int], *, vocab: int) -> dict[str, np.ndarray]:
    """One batch with two documents a row and some padding."""
    rows, length = shape
    place = np.arange(length)
    second, end = random.integers(2, length // 2, (rows, 1)), random.integers(length // 2 + 1, length + 1, (rows, 1))
    segments = np.where(place < second, 1, np.where(place < end, 2, 0)).astype(np.int32)
    return {
        "tokens": random.integers(0, vocab, shape, dtype=np.int32),
        "targets": random.integers(0, vocab, shape, dtype=np.int32),
        "loss_weights": ((segments > 0) * random.integers(0, 3, shape)).astype(np.float32),
        "segment_ids": segments,
        "positions": np.where(place < second, place, place - second).astype(np.int32),
    }


def with_extra_fields(batch: dict[str, np.ndarray], *, vocab: int, top_k: int) -> dict[str, np.ndarray]:
    """Add the fields that only some recipes read."""
    random, shape = np.random.default_rng(1), batch["tokens"].shape
    labels = np.where(random.random((shape[0], 1)) < 0.5, 1.0, -1.0) * (batch["segment_ids"] > 0)
    reference = -4.0 - random.random(shape)
    words = np.argsort(random.random((*shape, vocab)), axis=-1)[..., :top_k].astype(np.int32)
    likely = np.sort(random.dirichlet(np.ones(top_k + 1), shape)[..., :top_k])[..., ::-1]
    fields = {"labels": labels, "reference_logprobs": reference, "teacher_logprobs": np.log(likely)}
    return batch | {"teacher_tokens": words} | {name: field.astype(np.float32) for name, field in fields.items()}


def trajectory(config: RunConfig, *, steps: int = 5) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Metrics of every step, and the canonical state after the last. A configuration runs once a test session."""
    return _trajectory(config.model_dump_json(), steps)


@functools.lru_cache(maxsize=64)
def _trajectory(config_json: str, steps: int) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    config = RunConfig.model_validate_json(config_json)
    mesh = make_mesh(config.mesh)
    program = build(config, mesh)
    start = to_run_order(program, initial_state(config))
    state, step = jax.device_put(start, program.shardings, may_alias=False), program.compiled_step()
    synchronize, all_metrics = program.compiled_synchronization(), []
    for number, batch in enumerate(batches(config, steps), 1):
        state, metrics = step(state, make_global_arrays(batch, config, mesh))
        state = synchronize(state, number)
        all_metrics.append(metrics_to_host(metrics))
    state = jax.device_get(state)
    if program.replicas:
        return all_metrics, program.replicas.canonical(state, config.model, program.order)
    return all_metrics, to_canonical(
        {"params": state.params, "opt_state": state.opt_state}, config.model, program.order
    )


def to_run_order(program: Program, state: TrainState) -> TrainState:
    """Reorder the layers of `state` from canonical order to the run order of `program`."""
    parts = {part.name: getattr(state, part.name) for part in dataclasses.fields(state)}
    if program.replicas is None:
        return TrainState(**program.to_run_order(parts))
    per_replica = ("params", "opt_state", *(["outer"] if program.replicas.outer.per_replica else []))
    reorder = functools.partial(reorder_layers, before=None, after=program.order)
    reordered = {
        name: jax.vmap(reorder)(part) if name in per_replica else reorder(part) for name, part in parts.items()
    }
    return TrainState(**reordered | program.to_run_order({"frozen": state.frozen}))


def initial_state(config: RunConfig) -> TrainState:
    """The state before the first step, made on one device; `Program.initialize` must make the same one on any mesh."""
    single_device = {"mesh": MeshConfig(platform="cpu"), "memory": MemoryConfig(), "pipeline": PipelineConfig()}
    outer = config.outer.model_dump_json() if config.outer else None
    single = config.model_copy(update=single_device | {"microbatches": 1, "outer": None})
    return _initial_state(single.model_dump_json(), outer, config.mesh.replica)


@functools.lru_cache(maxsize=64)
def _initial_state(config_json: str, outer_json: str | None, replicas: int) -> TrainState:
    config = RunConfig.model_validate_json(config_json)
    if outer_json:
        config = config.model_copy(update={"outer": OuterConfig.model_validate_json(outer_json)})
    return jax.device_get(build(config, make_mesh(config.mesh), replica_count=replicas).initialize())


def assert_same(a: RunConfig, b: RunConfig, *, steps: int = 5, tolerance: float = 2e-5) -> None:
    """Assert that both runs have the same losses, gradient norms, and canonical state after `steps`."""
    (metrics_a, state_a), (metrics_b, state_b) = trajectory(a, steps=steps), trajectory(b, steps=steps)
    for number, (one, other) in enumerate(zip(metrics_a, metrics_b, strict=True)):
        for key in ("loss", "tokens", "grad_norm"):
            np.testing.assert_allclose(one[key], other[key], rtol=tolerance, err_msg=f"{key} of step {number}")
    assert_close(state_a, state_b, tolerance=tolerance)


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray], *, tolerance: float) -> None:
    """Assert that two canonical states are equal, each array relative to its largest element."""
    assert a.keys() == b.keys(), f"names differ: {sorted(a.keys() ^ b.keys())}"
    for name, array in a.items():
        scale = np.abs(array).max() + 1e-6
        # Adam turns rounding near zero gradients into steps of a learning rate's size: hence 10x.
        np.testing.assert_allclose(array / scale, b[name] / scale, atol=10 * tolerance, rtol=0, err_msg=name)
