"""The step: what it refuses to apply, how it counts, and which numbers are wide."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.equivalence import initial_state, tiny

from meshwright.configs.sections.parallel import PrecisionConfig
from meshwright.configs.sections.training import OptimizerConfig
from meshwright.memory import jaxpr_stats
from meshwright.parallel.gradients import Sums
from meshwright.parallel.layout import to_canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.state import TrainState
from meshwright.train.engine.program import build, matmul_precision
from meshwright.train.engine.step import make_step, make_update
from meshwright.train.optim.learning_rate_schedule import learning_rate_schedule
from meshwright.train.optim.optimizer_chain import build_optimizer, mean_gradient_norm
from meshwright.train.optim.optimizer_update import skip_nonfinite_or_spiking

NAN, INF = float("nan"), float("inf")


def fake_engine(params, frozen, batch, keys):
    """An engine whose batch says what loss and gradient it returns."""
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, batch["gradient"]), params)
    return Sums(batch["loss"], batch["weight"], gradient, {"seen": jnp.float32(6.0)})


def run(*batches, spike=None, weight=2.0):
    """States and metrics of a step of `fake_engine` on each (loss, gradient)."""
    section = OptimizerConfig(name="adamw", schedule="constant", learning_rate=0.1, weight_decay=0.0, ema=0.5)
    optimizer = build_optimizer(section, steps=10, spike=spike)
    params = {"head": {"kernel": jnp.ones((2, 2))}}
    rng = jax.random.key_data(jax.random.key(0))
    state = TrainState(jnp.int32(0), params, {}, optimizer.init(params), (), rng)
    schedule = learning_rate_schedule(section, steps=10)
    step = jax.jit(
        make_step(
            fake_engine,
            make_update(skip_nonfinite_or_spiking(optimizer), schedule=schedule, spike=spike),
            dropout=False,
        )
    )
    seen = [(state, None)]
    for loss, gradient in batches:
        numbers = {"loss": loss, "gradient": gradient, "weight": weight}
        batch = {key: jnp.float32(value) for key, value in numbers.items()} | {"tokens": jnp.zeros((1, 1))}
        seen.append(step(seen[-1][0], batch))
    return seen


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize(("loss", "gradient"), [(NAN, NAN), (1.0, NAN), (1.0, INF), (INF, 1.0)])
def test_an_update_that_is_not_finite_is_skipped_and_still_counts_as_a_step(loss, gradient):
    _, (before, _), (after, metrics), (later, fine) = run((1.0, 1.0), (loss, gradient), (1.0, 1.0))
    assert same((before.params, before.opt_state), (after.params, after.opt_state))
    assert int(after.step) == 2 and bool(metrics["skipped"])
    assert int(later.step) == 3 and not fine["skipped"] and not same(after.params, later.params)


def test_a_spike_over_the_mean_norm_so_far_is_skipped():
    """3.03 exceeds three times the mean of 1, though not of the mean it would have made."""
    _, (first, one), (before, _), (after, metrics), (_, fine) = run((1, 1), (1, 1), (1, 3.03), (1, 2.9), spike=3.0)
    assert not one["skipped"] and bool(metrics["skipped"]) and not fine["skipped"]
    assert same((before.params, before.opt_state), (after.params, after.opt_state))
    assert float(mean_gradient_norm(first.opt_state)) == pytest.approx(1.0)  # 2 x 2 elements of 1, by a weight of 2


def test_metrics_are_sums_divided_by_the_weight():
    _, (_, metrics) = run((3.0, 1.0))
    assert (metrics["loss"], metrics["tokens"], metrics["seen"]) == (1.5, 2.0, 3.0)
    assert metrics["grad_norm"] == pytest.approx(1.0) and metrics["learning_rate"] == pytest.approx(0.1)


def test_a_batch_without_targets_changes_no_parameter():
    """Weight zero: nothing is divided by nothing."""
    (before, _), (after, metrics) = run((0.0, 0.0), weight=0.0)
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and not metrics["skipped"]
    assert same(before.params, after.params)


def test_the_first_state_is_sharded_and_the_same_on_every_mesh():
    config = tiny(mesh={"data": 2, "fsdp": 2, "tensor": 2})
    program = build(config, make_mesh(config.mesh))
    state = program.initialize()
    for leaf, where in zip(jax.tree.leaves(state), jax.tree.leaves(program.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    expected, found = (to_canonical(jax.device_get(one), config.model) for one in (initial_state(config), state))
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, atol=1e-7, err_msg=name)


def outputs(jaxpr, primitive):
    """Dtypes that equations of `primitive` give."""
    return {
        equation.outvars[0].aval.dtype.name
        for equation, _ in jaxpr_stats.equations(jaxpr)
        if equation.primitive.name == primitive
    }


def test_bfloat16_compute_keeps_parameters_softmax_and_loss_in_float32():
    """Matrix products of the blocks read bfloat16; every exponential, square root and the loss are float32."""
    config = tiny(precision={"compute": "bfloat16"}, model={"activation": "gelu"})
    program = build(config, make_mesh(config.mesh))
    with jax.set_mesh(program.mesh):
        traced = jax.make_jaxpr(program.step)(program.shapes, program.batch_shapes)
        after, metrics = jax.eval_shape(program.step, program.shapes, program.batch_shapes)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(after.params)} == {"float32"}
    assert metrics["loss"].dtype == metrics["grad_norm"].dtype == jnp.float32
    for primitive in ("exp", "log", "rsqrt", "sqrt", "scatter-add"):
        assert outputs(traced, primitive) == {"float32"}, primitive
    read = [
        equation.invars[0].aval.dtype.name
        for equation, _ in jaxpr_stats.equations(traced)
        if equation.primitive.name == "dot_general"
    ]
    assert read.count("bfloat16") > read.count("float32")


def test_bfloat16_parameters_change_and_stay_bfloat16():
    """Arithmetic is float32: the update of a parameter is rounded once."""
    section = OptimizerConfig(name="sgd", b1=0.0, schedule="constant", learning_rate=1.0)
    optimizer = build_optimizer(section, steps=2)
    params = {"head": {"kernel": jnp.full((2,), 256.0, jnp.bfloat16)}}
    updates, _ = optimizer.update({"head": {"kernel": jnp.full((2,), -1.5)}}, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)["head"]["kernel"]
    assert after.dtype == jnp.bfloat16 and updates["head"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(after.astype(jnp.float32), 258.0)  # bfloat16 counts in twos here


def test_reduced_gradients_are_summed_in_their_dtype():
    config = tiny(precision={"gradients": "bfloat16"}, microbatches=2)
    program = build(config, make_mesh(config.mesh))
    with jax.set_mesh(program.mesh):
        _, metrics = jax.eval_shape(program.step, program.shapes, program.batch_shapes)
        carried = jax.make_jaxpr(program.step)(program.shapes, program.batch_shapes)
    assert metrics["grad_norm"].dtype == jnp.float32
    assert "bf16[64,16]" in str(carried)


@pytest.mark.parametrize(
    ("compute", "platform", "expected"),
    [("float32", "tpu", "highest"), ("float32", "gpu", "highest"), ("bfloat16", "tpu", None), ("float32", "cpu", None)],
)
def test_float32_products_are_float32_where_the_platform_would_round_their_inputs(compute, platform, expected):
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform)], dtype=object))
    assert matmul_precision(PrecisionConfig(compute=compute), mesh) == expected
