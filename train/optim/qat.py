"""Weights that are trained as codes: quantization-aware scaling (QAS) of arXiv:2206.15472.

    w = scale (code - zero)        so   d loss / d code = scale (d loss / d w)

Descent by that gradient would move the code by `scale` times too little, and the weight by scale^2: with steps of a
hundredth, ten thousand times too slowly. QAS divides the gradient by scale^2, which moves the weight as if it had been
trained itself. Here one scale is left out where the gradient is made, which is that of the weight, and the other where
the update is added: so norms, clipping, momentum, Adam and decay are those of weights, and of sgd there remains

    code' = code - learning_rate (d loss / d code) / scale^2

A step is a fraction of a code at most times. Nothing keeps fractions: a code goes up or down by chance, to its update
on the average (stochastic rounding, arXiv:1502.02551, section 3.1), by a key of the step and the layer, so no mesh
changes what is drawn. Departs: the paper computes with integers too, and has one scale an output; here the weights
alone are integers, with a scale for each group, and activations are what they always are.
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

ROUNDING_KEY = 2**32 - 2  # in the place of a row's number, beside that of a private run's noise: no row has it


class CodesState(NamedTuple):
    """What the next rounding is drawn by."""

    count: jax.Array  # int32: updates done


def dequantized_weights(params: Any, config: RunConfig) -> Any:
    """What the trained codes in `params` stand for; `params` themselves where there are none. Pure."""
    if not trains_codes(config):
        return params
    return dequantize_tree(params, config.model, config.quantization, dtype=jnp.dtype(config.precision.parameters))


def trains_codes(config: RunConfig) -> bool:
    """Whether weights that are trained are codes."""
    return config.quantization is not None and config.quantization.trained


def with_dequantized_weights(engine: Engine, config: RunConfig) -> Engine:
    """`engine` of parameters with codes; its gradient is by the weights they stand for."""

    def run(params: Any, frozen: Any, batch: Batch, keys: jax.Array | None, **told: Any) -> Sums:
        return engine(dequantized_weights(params, config), frozen, batch, keys, **told)

    return run if trains_codes(config) else engine


def stochastic_round(codes: jax.Array, keys: jax.Array) -> jax.Array:
    """Whole numbers around `codes` [layers, ...], each with these as its mean; `keys` are [layers]."""
    drawn = jax.vmap(lambda key: jax.random.uniform(key, codes.shape[1:]))(keys)
    return jnp.floor(codes + drawn)


def quantization_aware(
    optimizer: optax.GradientTransformation, *, config: RunConfig, order: LayerOrder
) -> optax.GradientTransformation:
    """`optimizer`, which is given weights, of the codes that stand for them; its state gets an entry `codes`.

    Gradients come by weights, updates go to codes. `order` is that of the layers in their stacks.
    """
    names = {path: layer_ids(path, config, order) for path, _ in kernel_layouts(config.model, config.quantization)}

    def init(params: Any) -> dict[str, Any]:
        return optimizer.init(dequantized_weights(params, config)) | {"codes": CodesState(jnp.zeros((), jnp.int32))}

    def update(gradient: Any, state: dict[str, Any], params: Any) -> tuple[Any, dict[str, Any]]:
        count, old = state["codes"].count, {name: part for name, part in state.items() if name != "codes"}
        moves, own = optimizer.update(gradient, old, dequantized_weights(params, config))
        key, updates = jax.random.fold_in(jax.random.fold_in(step_key(config), ROUNDING_KEY), count), copy_dicts(moves)
        for path, form in kernel_layouts(config.model, config.quantization):
            if (leaves := find_subtree(params, path)) is not None:
                linear, _, leaf = path.rpartition("/")
                keys = jax.vmap(jax.random.fold_in, (None, 0))(key, names[path])
                moved = unrounded_codes(find_subtree(moves, path), leaves, group=form.group)
                subtree(updates, linear)[leaf] = code_updates(jnp.clip(stochastic_round(moved, keys), 0, 255), leaves)
        return updates, own | {"codes": CodesState(count + 1)}

    return optax.GradientTransformation(init, update)


def unrounded_codes(move: jax.Array, leaves: dict[str, jax.Array], *, group: int) -> jax.Array:
    """Where the codes would be after the weights [layers, inputs..., outputs...] have made a `move`, float32."""
    scale = leaves["scale"]  # [layers, groups, outputs...]
    steps = move.reshape(*scale.shape[:2], group, *scale.shape[2:]) / scale[:, :, None]
    return leaves["codes"].astype(jnp.float32) + steps.reshape(leaves["codes"].shape)


def code_updates(codes: jax.Array, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What to add to `leaves` so that they hold `codes`."""
    still = jax.tree.map(jnp.zeros_like, leaves)
    # Bytes: what is taken below zero comes back when it is added.
    return still | {"codes": codes.astype(leaves["codes"].dtype) - leaves["codes"]}


def layer_ids(path: str, config: RunConfig, order: LayerOrder) -> np.ndarray:
    """A number for each layer in the stack of kernels at `path`: of its canonical name, wherever it stands."""
    numbers = [zlib.crc32(name.encode()) for name in canonical_names([path], config.model)[path]]
    places = range(len(numbers)) if order is None else order
    return np.array([numbers[repeat] if repeat >= 0 else 0 for repeat in places], np.uint32)
