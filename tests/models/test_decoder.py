"""The decoder: equal when scanned and unrolled, and able to learn."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from support.equivalence import TINY, batches, make_global_arrays, tiny
from support.weights import random_weights

from meshwright.configs.sections.model import ModelConfig
from meshwright.models.context import Context
from meshwright.models.decoder import decoder_graphdef
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.program import build


def test_unrolled_equals_scanned_and_so_do_the_gradients():
    results = []
    for scan in (True, False):
        model = ModelConfig(**TINY["model"] | {"layers": 5, "windows": [4, None], "scan": scan})

        def loss(params, model=model):
            tokens = jnp.arange(24).reshape(2, 12)
            ctx = Context(positions=jnp.broadcast_to(jnp.arange(12), (2, 12)))
            return jnp.sum(jnp.sin(nnx.merge(decoder_graphdef(model), params).hidden(tokens, ctx)[0]))

        results.append(jax.jit(jax.value_and_grad(loss))(random_weights(model)))
    for scanned, unrolled in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(scanned, unrolled, atol=1e-5 * np.abs(scanned).max())


def test_a_two_layer_model_memorizes_one_batch():
    config = tiny(steps=60, optimizer={"weight_decay": 0.0})
    mesh = make_mesh(config.mesh)
    program = build(config, mesh)
    state, step = program.initialize(), program.compiled_step()
    batch = make_global_arrays(batches(config, 1)[0], config, mesh)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > np.log(61) - 0.5 and losses[-1] < 0.5 * losses[0]
