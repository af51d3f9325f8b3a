"""Between the run's layout and canonical names: the one invertible map.

The run stacks layers [repeats, ...] and pads the vocabulary. Canonically there is one unpadded array per layer:

    params/segments/0/1/block/attn/q/kernel [repeats, ...]   <->   params/layers/7/attn/q/kernel
    opt_state/adamw/mu/segments/0/1/...                      <->   opt_state/adamw/mu/layers/7/...

What differs between replicas, arrays [replica, ...] in the run, is under `replica/3/`: `replica/3/params/layers/7/...`.
Manifests, exports, adapters, outer fragments and tests speak canonical names only.
"""

import re
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp

from ..configs.model import ModelConfig
from .rules import path_name

STACKED = re.compile(r"(?P<before>.*/)?segments/(?P<segment>\d+)/(?P<place>\d+)/block/(?P<rest>.*)")
VOCAB_DIMENSION = {"embed/embedding": 0, "head/kernel": 1}


def canonical(tree: Any, model: ModelConfig) -> dict[str, jax.Array]:
    """Every array of `tree` (parameters, or a state holding trees like them) by canonical name."""
    return {
        name: leaf[index]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        for name, index in places(path_name(path), jnp.shape(leaf), model)
    }


def run_shapes(tree: Any, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape in the run of every array of `tree` (or shapes); a padded vocabulary stays so."""
    return {
        name: tuple(size for size, part in zip_longest(leaf.shape, index) if part is None or isinstance(part, slice))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        for name, index in places(path_name(path), leaf.shape, model)
    }


def from_canonical(arrays: Mapping[str, Any], like: Any, model: ModelConfig) -> Any:
    """The inverse: a tree shaped as `like` (arrays or shapes), padding filled with zeros.

    Raises KeyError for a canonical name that `arrays` lacks.
    """

    def leaf(path: tuple[Any, ...], shape: Any) -> jax.Array:
        result = jnp.zeros(shape.shape, shape.dtype)
        for name, index in places(path_name(path), shape.shape, model):
            result = result.at[index].set(arrays[name])
        return result

    return jax.tree_util.tree_map_with_path(leaf, like)


def canonical_replicas(tree: Any, model: ModelConfig, *, replicas: int) -> dict[str, jax.Array]:
    """`canonical` of a tree whose arrays have a leading [replica]: every replica's own, under `replica/N/`."""
    return {
        f"replica/{replica}/{name}": leaf
        for replica in range(replicas)
        for name, leaf in canonical(jax.tree.map(lambda leaf: leaf[replica], tree), model).items()  # noqa: B023
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


def places(path: str, shape: tuple[int, ...], model: ModelConfig) -> list[tuple[str, tuple[Any, ...]]]:
    """(canonical name, index into the run's array) of everything the array at `path` holds."""
    if match := STACKED.fullmatch(path):
        before, rest = match["before"] or "", match["rest"]
        layers = layers_of(model, int(match["segment"]), int(match["place"]))
        if shape == (1,) and len(layers) > 1:  # where optax has nothing to remember it keeps a single zero
            return []
        if shape[:1] != (len(layers),):
            raise ValueError(f"{path}: shape {shape} does not begin with the {len(layers)} layers of its stack")
        return [(f"{before}layers/{layer}/{rest}", (repeat,)) for repeat, layer in enumerate(layers)]
    dimension = VOCAB_DIMENSION.get("/".join(path.split("/")[-2:]))
    if dimension is not None and len(shape) == 2 and shape[dimension] == model.padded_vocab:
        return [(path, (slice(None),) * dimension + (slice(model.vocab),))]
    return [(path, ())]


def layers_of(model: ModelConfig, segment: int, place: int) -> list[int]:
    """Layer numbers that the stack at (segment, place of the pattern) holds, in order."""
    first = sum(len(pattern) * repeats for pattern, repeats in model.segments[:segment])
    pattern, repeats = model.segments[segment]
    return [first + repeat * len(pattern) + place for repeat in range(repeats)]
