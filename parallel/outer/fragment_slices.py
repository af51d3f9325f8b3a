"""Extract a fragment of a parameter tree in the run layout, and insert it again.

Where the run stacks layers, a fragment has some rows of the stack: a slice if they are evenly spaced.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ...configs.sections.model import ModelConfig
from ..layout import LayerOrder, canonical_slices
from ..sharding import path_name
from .fragments import Fragment

FragmentArrays = dict[str, jax.Array]  # by path in the run layout


class FragmentSlicer(NamedTuple):
    """A fragment of trees like the parameters, every array with `leading` more dimensions in front."""

    extract: Callable[..., FragmentArrays]  # (tree, leading) -> arrays
    insert: Callable[..., Any]  # (tree, arrays, leading) -> tree


def slice_fragment(fragment: Fragment, model: ModelConfig, order: LayerOrder = None) -> FragmentSlicer:
    """The slicer of `fragment` for trees of `model`'s parameters; `order` is that of the run's stacks (`layout.py`)."""

    def index_of(path: str, leaf: jax.Array, leading: int) -> tuple[Any, ...] | None:
        index = fragment_index(path, leaf.shape[leading:], fragment, model, order)
        return None if index is None else (slice(None),) * leading + index

    def extract(tree: Any, leading: int = 0) -> FragmentArrays:
        leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        indices = {path: index_of(path, leaf, leading) for path, leaf in leaves.items()}
        return {path: leaves[path][index] for path, index in indices.items() if index is not None}

    def insert(tree: Any, arrays: FragmentArrays, leading: int = 0) -> Any:
        def replace(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            name = path_name(path)
            if name not in arrays:
                return leaf
            index = index_of(name, leaf, leading)
            return arrays[name] if leaf.shape == arrays[name].shape else leaf.at[index].set(arrays[name])

        return jax.tree_util.tree_map_with_path(replace, tree)

    return FragmentSlicer(extract, insert)


def fragment_index(
    path: str, shape: tuple[int, ...], fragment: Fragment, model: ModelConfig, order: LayerOrder = None
) -> tuple[Any, ...] | None:
    """The index of the fragment's part of the array at `path`: () for all of it, None for nothing."""
    slices = canonical_slices(path, shape, model, order)
    indices = [index for name, index in slices if fragment.contains(name)]
    if len(indices) == len(slices):
        return () if slices else None
    if not indices:
        return None
    columns = np.array(indices).T  # only stacks hold several arrays, and those are indexed by integers
    steps = np.diff(columns[0])
    if len(columns) == 1 and (steps == steps[:1]).all() and (steps > 0).all():
        first, step = int(columns[0][0]), int(steps[0]) if len(steps) else 1
        return (slice(first, first + step * len(indices), step),)
    return tuple(columns)
