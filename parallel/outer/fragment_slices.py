"""Taking a fragment out of a parameter tree in the run's layout, and putting it back.

Where the run stacks layers, a fragment's part of a stack is some of its rows: a slice where they are evenly spaced.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from ...configs.sections.model import ModelConfig
from ..layout import LayerOrder, canonical_slices
from ..sharding import path_name
from .fragments import Fragment

Piece = dict[str, jax.Array]  # by path in the run's layout


class Cut(NamedTuple):
    """A fragment of trees like the parameters, with `leading` more dimensions in front of every array."""

    take: Callable[..., Piece]  # (tree, leading) -> piece
    put: Callable[..., Any]  # (tree, piece, leading) -> tree


def cut(fragment: Fragment, model: ModelConfig, layers_order: LayerOrder = None) -> Cut:
    """How to take `fragment` out of a tree of `model`'s parameters and put it back.

    `layers_order` is that of the run's stacks (`parallel/layout.py`).
    """

    def where(path: str, leaf: jax.Array, leading: int) -> tuple[Any, ...] | None:
        index = rows(path, leaf.shape[leading:], fragment, model, layers_order)
        return None if index is None else (slice(None),) * leading + index

    def take(tree: Any, leading: int = 0) -> Piece:
        named = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        found = {path: (leaf, where(path, leaf, leading)) for path, leaf in named.items()}
        return {path: leaf[index] for path, (leaf, index) in found.items() if index is not None}

    def put(tree: Any, piece: Piece, leading: int = 0) -> Any:
        def replaced(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            name = path_name(path)
            if name not in piece:
                return leaf
            index = where(name, leaf, leading)
            return piece[name] if leaf.shape == piece[name].shape else leaf.at[index].set(piece[name])

        return jax.tree_util.tree_map_with_path(replaced, tree)

    return Cut(take, put)


def rows(
    path: str, shape: tuple[int, ...], fragment: Fragment, model: ModelConfig, layers_order: LayerOrder = None
) -> tuple[Any, ...] | None:
    """Index of the fragment's part of the array at `path`: () for all of it, None for nothing."""
    held = canonical_slices(path, shape, model, layers_order)
    indices = [index for name, index in held if fragment.owns(name)]
    if len(indices) == len(held):
        return () if held else None
    if not indices:
        return None
    columns = np.array(indices).T  # only stacks hold several arrays, and those are indexed by integers
    steps = np.diff(columns[0])
    if len(columns) == 1 and (steps == steps[:1]).all() and (steps > 0).all():
        first, step = int(columns[0][0]), int(steps[0]) if len(steps) else 1
        return (slice(first, first + step * len(indices), step),)
    return tuple(columns)
