"""Optimizers: sharded like parameters, the same on every mesh; masks, averages, clipping, per-layer matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.equivalence import assert_close, assert_same, tiny

from meshwright.configs.errors import UserError
from meshwright.configs.sections.parallel import MeshConfig
from meshwright.configs.sections.training import OptimizerConfig
from meshwright.parallel.layout import to_canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.sharding import optimizer_shardings, path_name, weight_shardings
from meshwright.train.engine.program import build
from meshwright.train.optim import optimizer_chain

SHARDED = {"fsdp": 2, "tensor": 2}


def arrays(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("name", optimizer_chain.RULES)
def test_state_is_sharded_like_its_parameter(name):
    """Also rows and columns of a factored one (adafactor, from 128 on): no dimension of a weight is left whole."""
    model = {"embed": 128, "mlp": 128} if name == "adafactor" else {}
    config = tiny(mesh=SHARDED, optimizer={"name": name, "ema": 0.9}, model=model)
    program = build(config, make_mesh(config.mesh))
    weights, shardings = arrays(program.shardings.params), arrays(program.shardings.opt_state)
    owned = 0
    for path, leaf in arrays(program.shapes.opt_state).items():
        owner = next((weight for weight in weights if path.endswith("/" + weight)), None)
        if owner is None or leaf.shape == (1,):
            continue
        owned += 1
        axes = [axis for axis in weights[owner].spec if axis is not None]
        kept = [axis for axis in shardings[path].spec if axis is not None]
        missing = len(arrays(program.shapes.params)[owner].shape) - leaf.ndim
        assert len(axes) - missing <= len(kept) and set(kept) <= set(axes), path
    assert owned >= len(weights)


# One weight of each kind: [vocab, embed], a norm, and two stacks of matrices.
BLOCK = {"attn": {"o": {"kernel": (2, 4, 4, 16)}}, "mlp": {"up": {"kernel": (2, 16, 24)}}}
KINDS = {
    "embed": {"embedding": (64, 16)},
    "final_norm": {"scale": (16,)},
    "segments": {
        "0": {"0": {"block": {"attn": {"o": {"kernel": (2, 4, 4, 16)}}, "mlp": {"up": {"kernel": (2, 16, 24)}}}}}
    },
}


@functools.lru_cache
def walk(section_json, *, sharded, steps=5):
    """Canonical {params, opt_state} before and after each of some updates of `KINDS` with random gradients."""
    mesh = make_mesh(MeshConfig(**(SHARDED if sharded else {}), platform="cpu"))
    optimizer = optimizer_chain.build_optimizer(OptimizerConfig.model_validate_json(section_json), steps=steps)
    shapes = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), KINDS, is_leaf=lambda x: isinstance(x, tuple)
    )
    where = weight_shardings(shapes, mesh=mesh, zero=3)
    where_state = optimizer_shardings(jax.eval_shape(optimizer.init, shapes), shapes, mesh=mesh)

    @functools.partial(jax.jit, out_shardings=(where, where_state))
    def update(params, opt_state, gradient):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.device_put(random_like(shapes, seed=99), where)
    opt_state = jax.device_put(optimizer.init(params), where_state)
    seen = []
    for step in range(steps + 1):
        seen.append(
            to_canonical(jax.device_get({"params": params, "opt_state": opt_state}), tiny(model={"vocab": 64}).model)
        )
        params, opt_state = update(params, opt_state, jax.device_put(random_like(shapes, seed=step), where))
    return seen


def walked(*, sharded=True, **section):
    return walk(OptimizerConfig(learning_rate=0.01, weight_decay=0.1, **section).model_dump_json(), sharded=sharded)


def random_like(shapes, *, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)


@pytest.mark.parametrize("name", optimizer_chain.RULES)
def test_a_sharded_optimizer_equals_one_device(name):
    one, many = (walked(sharded=sharded, name=name, clip=0.3, ema=0.5) for sharded in (False, True))
    assert_close(one[-1], many[-1], tolerance=1e-5)
    kernel = "params/layers/1/mlp/up/kernel"
    assert not np.allclose(one[0][kernel], one[-1][kernel])


def test_zero_1_repeats_parameters_shards_state_and_equals_one_device():
    config = tiny(mesh={"data": 2, "fsdp": 2, "zero": 1})
    program = build(config, make_mesh(config.mesh))
    name = "segments/0/0/block/mlp/up/kernel"
    assert "fsdp" not in arrays(program.shardings.params)[name].spec
    assert "fsdp" in arrays(program.shardings.opt_state)[f"adamw/mu/{name}"].spec
    assert_same(tiny(), config)


@pytest.mark.parametrize("embeddings", [False, True])
def test_exactly_the_kernels_decay(embeddings):
    model = {"family": "gpt2", "max_positions": 16, "tied_embeddings": False, "qk_norm": True}
    config = tiny(model=model, optimizer={"decay_embeddings": embeddings})
    params = build(config, make_mesh(config.mesh)).shapes.params
    decayed = {name for name, decays in arrays(optimizer_chain.decay_mask(config.optimizer)(params)).items() if decays}
    expected = {name for name in arrays(params) if name.endswith("/kernel")}
    assert decayed == expected | ({"embed/embedding", "embed/positions"} if embeddings else set())


def test_the_average_follows_the_parameters():
    states = walked(name="adamw", clip=0.3, ema=0.5)
    for name in [name for name in states[0] if name.startswith("params/")]:
        expected = states[0][name]
        for state in states[1:]:
            expected = 0.5 * expected + 0.5 * state[name]
        found = states[-1][f"opt_state/average/{name}"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_gradients_are_clipped_by_their_norm_over_all_devices():
    """sgd without momentum, decay left out: the update's norm is learning rate x clip."""
    section = OptimizerConfig(name="sgd", b1=0.0, clip=0.1, schedule="constant", learning_rate=0.01)
    before, after, *_ = walk(section.model_dump_json(), sharded=True)
    moved = {name: after[name] - before[name] for name in before if name.startswith("params/")}
    assert float(optax.global_norm(moved)) == pytest.approx(0.1 * 0.01, rel=1e-4)


def test_muon_on_a_stack_is_muon_on_each_layers_matrix():
    """Against optax's plain two-dimensional rule, a layer at a time; the output map's inputs are [heads, head_dim]."""
    config = tiny(optimizer={"name": "muon"}, model={"layers": 3})
    rule = optimizer_chain.RULES["muon"](config.optimizer)
    shapes = build(config, make_mesh(config.mesh)).shapes.params
    params, gradient = random_like(shapes, seed=0), random_like(shapes, seed=1)
    updates, _ = jax.jit(lambda g, p: rule.update(g, rule.init(p), p))(gradient, params)
    plain = optax.contrib.muon(1.0, beta=config.optimizer.b1, consistent_rms=0.2)
    alone = jax.jit(lambda matrix: plain.update({"w": matrix}, plain.init({"w": matrix}), {"w": matrix})[0]["w"])
    found = to_canonical(updates, config.model)
    for name, matrix in to_canonical(gradient, config.model).items():
        if name.startswith("layers/") and name.endswith("/kernel"):
            rows = matrix.shape[0] * (matrix.shape[1] if name.endswith("o/kernel") else 1)
            expected = -alone(matrix.reshape(rows, -1))
            np.testing.assert_allclose(found[name].reshape(rows, -1), expected, atol=2e-5, err_msg=name)


def test_muon_without_a_matrix_is_refused():
    rule = optimizer_chain.RULES["muon"](OptimizerConfig(name="muon"))
    with pytest.raises(UserError, match=r"optimizer.name: muon.*use adamw"):
        rule.init({"embed": {"embedding": jnp.zeros((4, 4))}})


def test_adafactor_clips_each_layer_by_itself():
    """One layer's spike must not shrink its neighbours in the stack."""
    updates = {"segments": {"0": {"0": {"block": {"mlp": {"up": {"kernel": jnp.ones((2, 4, 4))}}}}}}}
    spiked = jax.tree.map(lambda leaf: leaf.at[0].mul(100.0), updates)
    clipped, _ = optimizer_chain.clip_by_layer_rms(1.0).update(spiked, optax.EmptyState())
    np.testing.assert_allclose(jax.tree.leaves(clipped)[0], np.ones((2, 4, 4)))


def test_state_is_float32_under_bfloat16_parameters():
    config = tiny(precision={"parameters": "bfloat16"}, optimizer={"ema": 0.9})
    shapes = build(config, make_mesh(config.mesh)).shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes.opt_state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
