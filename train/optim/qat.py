"""Quantization-aware training: the trained weights are integer codes. Scaling (QAS) as in arXiv:2206.15472.

    w = scale (code - zero)        so   d loss / d code = scale (d loss / d w)

Descent along that gradient would move the code by a factor `scale` too little, and the weight by scale^2: with a scale
of a hundredth, ten thousand times too slowly. QAS divides the gradient by scale^2, which moves the weight as if it were
trained itself. Here the gradient is taken by the weight, which leaves out one scale, and the update is divided by the
other one when it is added to the code. So norms, clipping, momentum, Adam and decay are those of weights, and for sgd

    code' = code - learning_rate (d loss / d code) / scale^2

A step is usually a fraction of a code. Codes hold no fractions, so they are rounded up or down at random, to the update
on average (stochastic rounding, arXiv:1502.02551, section 3.1). The key is that of the step and the layer, so the
result depends on no mesh. Difference from the paper: it computes with integers too, and has one scale for each output.
Here only the weights are integers, with one scale for each group, and activations do not change.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ...configs.run import RunConfig
from ...models.adapters.attach import copy_dicts, subtree
from ...models.adapters.selection import canonical_names
from ...models.quantized_model import dequantize_tree, find_subtree, kernel_layouts
from ...parallel.gradients import Batch, Engine, Sums
from ...parallel.layout import LayerOrder
from ...parallel.prng import step_key

ROUNDING_KEY_ID = 2**32 - 2  # used in place of a row id, like `dp_sgd.NOISE_KEY_ID`; no row has it


class CodesState(NamedTuple):
    """Seeds the next rounding."""

    count: jax.Array  # int32: updates done


def dequantized_weights(params: Any, config: RunConfig) -> Any:
    """`params` with the weights that their trained codes stand for; `params` themselves without codes. Pure."""
    if not trains_codes(config):
        return params
    return dequantize_tree(params, config.model, config.quantization, dtype=jnp.dtype(config.precision.parameters))


def trains_codes(config: RunConfig) -> bool:
    """Whether the trained weights are codes."""
    return config.quantization is not None and config.quantization.trained


def with_dequantized_weights(engine: Engine, config: RunConfig) -> Engine:
    """`engine` for parameters with codes; its gradient is by the weights that the codes stand for."""

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None, **extra_inputs: Any) -> Sums:
        return engine(dequantized_weights(params, config), frozen, batch, keys, **extra_inputs)

    return run if trains_codes(config) else engine


def stochastic_round(codes: jax.Array, keys: jax.Array) -> jax.Array:
    """Round `codes` [layers, ...] up or down at random, so that the mean result is `codes`; `keys` are [layers]."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, codes.shape[1:]))(keys)
    return jnp.floor(codes + noise)


def quantization_aware(
    optimizer: optax.GradientTransformation, *, config: RunConfig, order: LayerOrder
) -> optax.GradientTransformation:
    """`optimizer` of weights, applied to the codes that stand for them; its state gets an entry `codes`.

    Gradients are by weights, updates are for codes. `order` is the run order of the layers.
    """
    layouts = list(kernel_layouts(config.model, config.quantization))
    ids = {path: layer_ids(path, config, order) for path, _ in layouts}

    def init(params: Any) -> dict[str, Any]:
        return optimizer.init(dequantized_weights(params, config)) | {"codes": CodesState(jnp.zeros((), jnp.int32))}

    def update(gradient: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        inner_state = dict(state)
        count = inner_state.pop("codes").count
        weight_updates, inner_state = optimizer.update(gradient, inner_state, dequantized_weights(params, config))
        updates = copy_dicts(weight_updates)
        key = jax.random.fold_in(jax.random.fold_in(step_key(config), ROUNDING_KEY_ID), count)
        for path, layout in layouts:
            if (leaves := find_subtree(params, path)) is not None:
                module, _, leaf = path.rpartition("/")
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, ids[path])
                codes = unrounded_codes(find_subtree(weight_updates, path), leaves, group=layout.group)
                subtree(updates, module)[leaf] = code_updates(jnp.clip(stochastic_round(codes, keys), 0, 255), leaves)
        return updates, inner_state | {"codes": CodesState(count + 1)}

    return optax.GradientTransformation(init, update)


def unrounded_codes(update: jax.Array, leaves: dict[str, jax.Array], *, group: int) -> jax.Array:
    """The codes after an `update` of their weights [layers, inputs..., outputs...], float32, before rounding."""
    scale = leaves["scale"]  # [layers, groups, outputs...]
    steps = update.reshape(*scale.shape[:2], group, *scale.shape[2:]) / scale[:, :, None]
    return leaves["codes"].astype(jnp.float32) + steps.reshape(leaves["codes"].shape)


def code_updates(codes: jax.Array, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What to add to `leaves` so that they hold `codes`."""
    zeros = jax.tree.map(jnp.zeros_like, leaves)
    # The difference of bytes wraps around below zero, and back when it is added.
    return zeros | {"codes": codes.astype(leaves["codes"].dtype) - leaves["codes"]}


def layer_ids(path: str, config: RunConfig, order: LayerOrder) -> np.ndarray:
    """A number for each layer in the stack of kernels at `path`, a hash of its canonical name, in run order."""
    hashes = [zlib.crc32(name.encode()) for name in canonical_names([path], config.model)[path]]
    repeats = range(len(hashes)) if order is None else order
    return np.array([hashes[repeat] if repeat >= 0 else 0 for repeat in repeats], np.uint32)
