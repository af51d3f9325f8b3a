"""Weights that are trained as codes: descent as of the weights they stand for, and nothing kept but codes."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import assert_close, assert_same, batches, tiny

from meshwright.configs.errors import UserError
from meshwright.configs.loader import merge_trees
from meshwright.configs.sections.parallel import MeshConfig
from meshwright.models.quantized.kernel import dequantize_kernel, quantize_kernel
from meshwright.models.quantized_model import kernel_layouts
from meshwright.parallel.layout import to_canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.program import build
from meshwright.train.optim import qat
from meshwright.train.run import train

SGD = {"name": "sgd", "b1": 0.0, "clip": None, "learning_rate": 0.1, "weight_decay": 0.0, "warmup_steps": 0}
INT8 = {"format": "int8", "group": 32, "trained": True}
LAST = {"method": "selective", "layers": 1}
CODES = {"model": {"embed": 64, "mlp": 64}, "quantization": INT8, "adapter": LAST, "optimizer": SGD}


def program_of(**settings):
    config = tiny(**settings)
    return build(config, make_mesh(config.mesh))


def test_sgd_on_codes_equals_sgd_on_their_weights():
    """With the paper's 1 / scale^2, before anything is rounded; without it a step is thousands of times too short."""
    config = tiny(**merge_trees(CODES, {"model": {"embed": 16}, "quantization": {"group": 8}}))
    _, form = next(kernel_layouts(config.model, config.quantization))
    random = np.random.default_rng(0)
    kernel = jnp.asarray(random.normal(size=(16, 4, 4)) * np.geomspace(0.01, 1.0, 16).reshape(16, 1, 1), jnp.float32)
    leaves, x = quantize_kernel(kernel, form), jnp.asarray(random.normal(size=(5, 16)), jnp.float32)
    loss = lambda kernel: jnp.square(jnp.tanh(jnp.einsum("ni,ihd->nhd", x, kernel)) - 0.3).sum()
    whole, rate = dequantize_kernel(leaves, form), 0.01
    gradient = jax.grad(loss)(whole)
    of_codes = jax.grad(lambda own: loss(dequantize_kernel(leaves | {"codes": own}, form)))(
        leaves["codes"].astype(jnp.float32)
    )
    scale = jnp.repeat(leaves["scale"], form.group, axis=0)
    scaled = leaves["codes"] - rate * of_codes / scale**2
    stacked = jax.tree.map(lambda leaf: leaf[None], leaves)
    np.testing.assert_allclose(
        qat.unrounded_codes(-rate * gradient[None], stacked, group=form.group)[0], scaled, atol=1e-3
    )
    np.testing.assert_allclose(
        dequantize_kernel(leaves | {"codes": scaled}, form),
        whole - rate * gradient,
        atol=1e-6 * float(jnp.abs(whole).max()),
    )
    plainly = dequantize_kernel(leaves | {"codes": leaves["codes"] - rate * of_codes}, form)
    assert float(jnp.linalg.norm(plainly - whole)) < 1e-3 * rate * float(jnp.linalg.norm(gradient))


def test_rounding_is_right_on_average_and_keeps_whole_codes():
    keys = jax.random.split(jax.random.key(0), 20_000)
    wanted = jnp.array([3.0, 0.25, 7.9, 254.5])
    drawn = qat.stochastic_round(jnp.broadcast_to(wanted, (len(keys), 4)), keys)
    np.testing.assert_array_equal(drawn, jnp.round(drawn))
    assert np.abs(drawn - wanted).max() < 1
    np.testing.assert_allclose(drawn.mean(axis=0), wanted, atol=0.015)
    np.testing.assert_array_equal(drawn[:, 0], 3.0)


def after(program, state, batch, *, steps):
    """Losses of `steps` on one batch, and the state then."""
    step, losses = program.compiled_step(), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(state)


@pytest.fixture(scope="module")
def runs():
    """(program, state before, losses, state after) of a block trained in codes, and of the weights they stand for."""
    programs = [
        program_of(**CODES, steps=40),
        program_of(**CODES | {"quantization": INT8 | {"trained": False}}, steps=40),
    ]
    starts = [program.initialize() for program in programs]
    starts[1] = dataclasses.replace(starts[1], params=jax.tree.map(jnp.copy, programs[0].eval_params(starts[0])))
    batch = make_global_arrays(batches(programs[0].config, 1)[0], programs[0].config, programs[0].mesh)
    before = jax.device_get(starts)
    return [
        (program, first, *after(program, start, batch, steps=30))
        for program, start, first in zip(programs, starts, before, strict=True)
    ]


def test_codes_train_like_the_weights(runs):
    """The first gradient is theirs, and the loss falls as theirs does although nothing is kept of what was rounded."""
    (program, start, losses, _), (other, same, wanted, _) = runs
    batch = batches(program.config, 1)[0]
    with jax.set_mesh(program.mesh):
        one, two = (
            jax.jit(lambda state, own=own: own.gradient_engine(state.params, state.frozen, batch, None).gradient)(state)
            for own, state in ((program, start), (other, same))
        )
    assert_close(to_canonical(one, program.config.model), to_canonical(two, other.config.model), tolerance=1e-6)
    assert losses[0] == pytest.approx(wanted[0], rel=1e-6)
    assert wanted[0] - wanted[-1] > 0.5
    np.testing.assert_allclose(losses, wanted, atol=0.05 * (wanted[0] - wanted[-1]))


def test_the_state_holds_codes_and_no_weights(runs):
    (program, start, _, end), _ = runs
    before, now = (to_canonical(state.params, program.config.model) for state in (start, end))
    kernels = {name for name in now if name.endswith("/kernel/codes")}
    assert len(kernels) == 7 and all(now[name].dtype == np.uint8 and name.startswith("layers/1/") for name in kernels)
    assert all((now[name] != before[name]).any() for name in kernels)
    for name in now:
        if name.endswith(("/scale", "/zero")) and "/kernel/" in name:
            np.testing.assert_array_equal(now[name], before[name])
    size = sum(now[name].size for name in kernels)
    assert sum(leaf.nbytes for name, leaf in now.items() if "/kernel/" in name) == size * (
        1 + 5 / 32
    )  # a scale and a zero a group
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(end.opt_state)) < 100
    whole = to_canonical(jax.device_get(program.dequantized_weights(start)), program.config.model)
    assert {leaf.dtype for leaf in whole.values()} == {np.dtype(np.float32)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"mesh": {"fsdp": 2, "tensor": 2}}, {"mesh": {"pipe": 2}, "microbatches": 4, "pipeline": {"schedule": "zb-h1"}}],
    ids=["mesh", "pipeline"],
)
@pytest.mark.parametrize("rule", [SGD, {"name": "sgd", "clip": 1.0, "weight_decay": 0.1}], ids=["sgd", "momentum"])
def test_the_result_is_the_same_on_every_mesh(changes, rule):
    """Every code goes up or down as on one device, wherever its layer stands."""
    every = CODES | {"adapter": {"method": "selective", "targets": ["layers/*"]}, "optimizer": SGD | rule}
    own = {"microbatches": changes.get("microbatches", 1)}
    assert_same(tiny(**every, **own), tiny(**every, **changes), steps=2)


@pytest.mark.slow
def test_a_run_resumes_from_its_codes(tmp_path, monkeypatch):
    """Stopped in the middle it ends where it would have, on another mesh: what is rounded how is no chance of a run."""
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path / "cache"))
    told = {"name": "codes", "checkpoint": {"every": 2}, "logging": {"every": 1, "tensorboard": False}}
    config = tiny(**merge_trees(CODES, {"model": {"vocab": 384}}), **told, steps=4, data={"held_out": 0.0})
    whole = train(config, process_info=ProcessInfo(), root=tmp_path)
    shutil.rmtree(tmp_path / "codes/checkpoints/4")
    there = config.model_copy(update={"mesh": MeshConfig(platform="cpu", data=2, tensor=2)})
    rest = train(there, process_info=ProcessInfo(), root=tmp_path)
    assert rest.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)


MISTAKES = {
    "an adapter": ({"adapter": {"method": "lora"}}, "quantization.trained: true, but adapter.method lora trains no"),
    "few bits": ({"quantization": {"format": "int4"}}, "quantization.trained: true .*int4.*int8"),
    "an average": ({"optimizer": {"ema": 0.9}}, "optimizer.ema: 0.9 .*quantization.trained"),
    "replicas": ({"mesh": {"replica": 2}, "outer": {"name": "diloco", "every": 2}}, "quantization.trained: .*outer"),
}


@pytest.mark.parametrize(("changes", "error"), MISTAKES.values(), ids=MISTAKES)
def test_settings_that_do_not_work_with_codes_are_refused(changes, error):
    with pytest.raises(UserError, match=error):
        tiny(**merge_trees(CODES, changes))


def test_trained_codes_without_a_linear_map_are_refused():
    with pytest.raises(UserError, match=r"quantization.trained: true, but no linear map is trained"):
        program_of(**CODES | {"adapter": {"method": "selective", "targets": ["final_norm/*"]}}).shapes  # noqa: B018
