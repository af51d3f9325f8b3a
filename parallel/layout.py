"""The one invertible map between the run layout and canonical names.

A run stacks layers [repeats, ...] and pads the vocabulary. A pipeline stacks layers in the order of its devices, with
padding if a stage is short: `order` gives the repeat at each index of a stack, -1 for padding; without a pipeline it is
None. Canonically there is one unpadded array per layer:

    params/segments/0/1/block/attn/q/kernel [repeats, ...]   <->   params/layers/7/attn/q/kernel
    opt_state/adamw/mu/segments/0/1/...                      <->   opt_state/adamw/mu/layers/7/...

What differs between replicas, arrays [replica, ...] in the run, is under `replica/3/`: `replica/3/params/layers/7/...`.
Manifests, exports, adapters, outer fragments and tests speak canonical names only.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..configs.sections.model import ModelConfig
from .sharding import path_name

STACKED_PATH = re.compile(r"(?P<prefix>.*/)?segments/(?P<segment>\d+)/(?P<position>\d+)/block/(?P<suffix>.*)")
LayerOrder = Sequence[int] | None
VOCAB_DIMENSION = {"embed/embedding": 0, "head/kernel": 1}


def to_canonical(tree: Any, model: ModelConfig, order: LayerOrder = None) -> dict[str, jax.Array]:
    """Every array of `tree` (parameters, or a state holding trees like them) by canonical name."""
    return {
        name: leaf[index]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        for name, index in canonical_slices(path_name(path), jnp.shape(leaf), model, order)
    }


def run_shapes(tree: Any, model: ModelConfig, order: LayerOrder = None) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape in the run of every array of `tree` (or shapes): with a padded vocabulary."""
    return {
        name: tuple(size for size, part in zip_longest(leaf.shape, index) if part is None or isinstance(part, slice))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        for name, index in canonical_slices(path_name(path), leaf.shape, model, order)
    }


def from_canonical(arrays: Mapping[str, Any], like: Any, model: ModelConfig, order: LayerOrder = None) -> Any:
    """The inverse of `to_canonical`: a tree shaped as `like` (arrays or shapes), with zeros in all padding.

    Raises KeyError for a canonical name that `arrays` lacks.
    """

    def restore_leaf(path: tuple[Any, ...], shape: Any) -> jax.Array:
        leaf = jnp.zeros(shape.shape, shape.dtype)
        for name, index in canonical_slices(path_name(path), shape.shape, model, order):
            leaf = leaf.at[index].set(arrays[name])
        return leaf

    return jax.tree_util.tree_map_with_path(restore_leaf, like)


def to_canonical_replicas(
    tree: Any, model: ModelConfig, *, replicas: int, order: LayerOrder = None
) -> dict[str, jax.Array]:
    """`to_canonical` for a tree whose arrays have a leading [replica]: each replica's arrays under `replica/N/`."""
    return {
        f"replica/{replica}/{name}": leaf
        for replica in range(replicas)
        for name, leaf in to_canonical(jax.tree.map(lambda leaf: leaf[replica], tree), model, order).items()  # noqa: B023
    }


def from_canonical_replicas(arrays: Mapping[str, Any], like: Any, model: ModelConfig, *, replicas: int) -> Any:
    """The inverse of `to_canonical_replicas`: a tree shaped as `like`. Raises KeyError like `from_canonical`."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), like)
    trees = []
    for replica in range(replicas):
        prefix = f"replica/{replica}/"
        names = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        trees.append(from_canonical(names, shapes, model))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def canonical_slices(
    path: str, shape: tuple[int, ...], model: ModelConfig, order: LayerOrder = None
) -> list[tuple[str, tuple[Any, ...]]]:
    """(canonical name, index into the array) of each canonical array that the run's array at `path` holds."""
    if match := STACKED_PATH.fullmatch(path):
        prefix, suffix = match["prefix"] or "", match["suffix"]
        layers = stack_layers(model, int(match["segment"]), int(match["position"]))
        repeats = range(len(layers)) if order is None else order
        if shape == (1,) and len(repeats) > 1:  # optax keeps a single zero where it has no statistic
            return []
        if shape[:1] != (len(repeats),):
            raise ValueError(f"{path}: shape {shape} does not begin with the {len(repeats)} layers of its stack")
        names = [f"{prefix}layers/{layer}/{suffix}" for layer in layers]
        return [(names[repeat], (index,)) for index, repeat in enumerate(repeats) if repeat >= 0]
    dimension = VOCAB_DIMENSION.get("/".join(path.split("/")[-2:]))
    if dimension is not None and len(shape) == 2 and shape[dimension] == model.padded_vocab:
        return [(path, (slice(None),) * dimension + (slice(model.vocab),))]
    return [(path, ())]


def reorder_layers(tree: Any, *, before: LayerOrder, after: LayerOrder) -> Any:
    """`tree` (arrays of JAX or numpy) with stacks in the order `after` instead of `before`; padding is zeros.

    None is the plain order, of as many repeats as the other order has.
    """
    if (None if before is None else tuple(before)) == (None if after is None else tuple(after)):
        return tree
    count = max(*(before or ()), *(after or ()), -1, -1) + 1
    before, after = (tuple(range(count)) if order is None else tuple(order) for order in (before, after))
    source = np.array([before.index(repeat) if repeat >= 0 else 0 for repeat in after])
    is_layer = np.array([repeat >= 0 for repeat in after])

    def reorder_leaf(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if not STACKED_PATH.fullmatch(path_name(path)) or jnp.shape(leaf)[:1] != (len(before),):
            return leaf
        where = np.where if isinstance(leaf, np.ndarray) else jnp.where
        return where(is_layer.reshape(-1, *[1] * (leaf.ndim - 1)), leaf[source], np.zeros((), leaf.dtype))

    return jax.tree_util.tree_map_with_path(reorder_leaf, tree)


def stack_layers(model: ModelConfig, segment: int, position: int) -> list[int]:
    """Numbers of the layers in the stack at `position` of the pattern of `segment`, in order."""
    first = sum(len(pattern) * repeats for pattern, repeats in model.segments[:segment])
    pattern, repeats = model.segments[segment]
    return [first + repeat * len(pattern) + position for repeat in range(repeats)]
