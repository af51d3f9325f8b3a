"""Between the run's layout and canonical names: the one invertible map.

The run stacks layers [repeats, ...] and pads the vocabulary. A pipeline stacks them in the order in which its devices
hold them, with empty places where a stage is short: `order` names the repeat at each place, -1 for none; without a
pipeline it is None. Canonically there is one unpadded array per layer:

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

STACKED = re.compile(r"(?P<before>.*/)?segments/(?P<segment>\d+)/(?P<place>\d+)/block/(?P<rest>.*)")
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
    """Canonical name -> shape in the run of every array of `tree` (or shapes); a padded vocabulary stays so."""
    return {
        name: tuple(size for size, part in zip_longest(leaf.shape, index) if part is None or isinstance(part, slice))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        for name, index in canonical_slices(path_name(path), leaf.shape, model, order)
    }


def from_canonical(arrays: Mapping[str, Any], like: Any, model: ModelConfig, order: LayerOrder = None) -> Any:
    """The inverse: a tree shaped as `like` (arrays or shapes), padding and empty places filled with zeros.

    Raises KeyError for a canonical name that `arrays` lacks.
    """

    def leaf(path: tuple[Any, ...], shape: Any) -> jax.Array:
        result = jnp.zeros(shape.shape, shape.dtype)
        for name, index in canonical_slices(path_name(path), shape.shape, model, order):
            result = result.at[index].set(arrays[name])
        return result

    return jax.tree_util.tree_map_with_path(leaf, like)


def to_canonical_replicas(
    tree: Any, model: ModelConfig, *, replicas: int, order: LayerOrder = None
) -> dict[str, jax.Array]:
    """`canonical` of a tree whose arrays have a leading [replica]: every replica's own, under `replica/N/`."""
    return {
        f"replica/{replica}/{name}": leaf
        for replica in range(replicas)
        for name, leaf in to_canonical(jax.tree.map(lambda leaf: leaf[replica], tree), model, order).items()  # noqa: B023
    }


def from_canonical_replicas(arrays: Mapping[str, Any], like: Any, model: ModelConfig, *, replicas: int) -> Any:
    """The inverse: a tree shaped as `like`, whose arrays have a leading [replica]. Raises as `from_canonical`."""
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), like)
    parts = []
    for replica in range(replicas):
        prefix = f"replica/{replica}/"
        own = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        parts.append(from_canonical(own, one, model))
    return jax.tree.map(lambda *each: jnp.stack(each), *parts)


def canonical_slices(
    path: str, shape: tuple[int, ...], model: ModelConfig, order: LayerOrder = None
) -> list[tuple[str, tuple[Any, ...]]]:
    """(canonical name, index into the run's array) of everything the array at `path` holds."""
    if match := STACKED.fullmatch(path):
        before, rest = match["before"] or "", match["rest"]
        layers = layers_of(model, int(match["segment"]), int(match["place"]))
        held = range(len(layers)) if order is None else order
        if shape == (1,) and len(held) > 1:  # where optax has nothing to remember it keeps a single zero
            return []
        if shape[:1] != (len(held),):
            raise ValueError(f"{path}: shape {shape} does not begin with the {len(held)} layers of its stack")
        return [(f"{before}layers/{layers[one]}/{rest}", (place,)) for place, one in enumerate(held) if one >= 0]
    dimension = VOCAB_DIMENSION.get("/".join(path.split("/")[-2:]))
    if dimension is not None and len(shape) == 2 and shape[dimension] == model.padded_vocab:
        return [(path, (slice(None),) * dimension + (slice(model.vocab),))]
    return [(path, ())]


def reorder_layers(tree: Any, *, before: LayerOrder, after: LayerOrder) -> Any:
    """`tree` (arrays of JAX or numpy) with stacks in the order `after` instead of `before`; empty places are zeros.

    None is the plain order, of as many repeats as the other one has.
    """
    if (None if before is None else tuple(before)) == (None if after is None else tuple(after)):
        return tree
    count = max(*(before or ()), *(after or ()), -1, -1) + 1
    before, after = (tuple(range(count)) if order is None else tuple(order) for order in (before, after))
    source = np.array([before.index(repeat) if repeat >= 0 else 0 for repeat in after])
    filled = np.array([repeat >= 0 for repeat in after])

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if not STACKED.fullmatch(path_name(path)) or jnp.shape(leaf)[:1] != (len(before),):
            return leaf
        where = np.where if isinstance(leaf, np.ndarray) else jnp.where
        return where(filled.reshape(-1, *[1] * (leaf.ndim - 1)), leaf[source], np.zeros((), leaf.dtype))

    return jax.tree_util.tree_map_with_path(one, tree)


def layers_of(model: ModelConfig, segment: int, place: int) -> list[int]:
    """Layer numbers that the stack at (segment, place of the pattern) holds, in order."""
    first = sum(len(pattern) * repeats for pattern, repeats in model.segments[:segment])
    pattern, repeats = model.segments[segment]
    return [first + repeat * len(pattern) + place for repeat in range(repeats)]
