"""Run layouts in checkpoints: where the canonical arrays lie in the arrays of a run, and conversion between layouts.

A checkpoint stores the arrays of the run as they are, and its manifest records where each canonical array lies in them.
So a run with another layout (other stacks of layers, another padding of the vocabulary) can extract the canonical
arrays and build its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..configs.sections.model import ModelConfig
from ..parallel.layout import LayerOrder, canonical_slices
from .fingerprints import Index, logical_shape
from .manifest import Manifest, index_from_json

# (path, shape) of an array of the run -> (canonical name, index into that array) of each canonical array in it
Locate = Callable[[str, tuple[int, ...]], list[tuple[str, Index]]]


class Layout(NamedTuple):
    """The name of a run layout, and where it puts the canonical arrays."""

    name: str
    locate: Locate


def make_layout(
    model: ModelConfig, order: LayerOrder = None, *, owners: Sequence[str] = (), per_owner: Sequence[str] = ()
) -> Layout:
    """Return the layout of a run: layers stacked by segment, in the `order` of a pipeline, vocabulary padded.

    Arrays under the state fields `per_owner` have a leading dimension [owners]. Each of `owners` is the prefix of the
    canonical names of its slice (`replica/3`).
    """
    locate = partial(canonical_slices, model=model, order=order)

    def locate_with_owners(path: str, shape: tuple[int, ...]) -> list[tuple[str, Index]]:
        if path.split("/")[0] not in per_owner:
            return locate(path, shape)
        slices = locate(path, shape[1:])
        return [(f"{owner}/{name}", (number, *index)) for number, owner in enumerate(owners) for name, index in slices]

    stages = "" if order is None else f" as {','.join(map(str, order))}"
    return Layout(f"stacked{stages}", locate_with_owners if owners else locate)


def covers_array(shape: Sequence[int], indices: Sequence[Index]) -> bool:
    """Return whether the disjoint logical arrays at `indices` together are all of an array of `shape`."""
    return sum(math.prod(logical_shape(shape, index)) for index in indices) == math.prod(shape)


def convert_arrays(
    arrays: Mapping[str, jax.Array], manifest: Manifest, *, shapes: Mapping[str, Any], layout: Layout
) -> dict[str, jax.Array]:
    """Convert the stored `arrays` of a checkpoint to the arrays of a run with `shapes`, all by path; padding is 0.

    An array of the run without canonical arrays in it (a placeholder of optax) is copied if the shapes agree.
    """
    result = {}
    for path, like in shapes.items():
        locate = layout.locate(path, tuple(like.shape))
        if not locate and path in arrays and arrays[path].shape == like.shape:
            result[path] = arrays[path]
            continue
        array = jnp.zeros(like.shape, like.dtype)
        for name, index in locate:
            entry = manifest.arrays[name]
            array = array.at[index].set(arrays[entry.path][index_from_json(entry.index)])
        result[path] = array
    return result
