"""Between the arrays a run holds and the canonical ones: what a checkpoint needs to know of a layout.

A layout is a name and a function (path, shape) -> [(canonical name, index into the run's array)]. A checkpoint stores
the run's arrays as they are and records where each canonical array lies in them, so that a run of another layout
(layers stacked otherwise, another padding of the vocabulary) can take them apart and put its own together.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..configs.sections.model import ModelConfig
from ..parallel.layout import Order, places
from .fingerprints import Index, logical_shape, volume
from .manifest import Manifest, decoded

Places = Callable[[str, tuple[int, ...]], list[tuple[str, Index]]]


class Layout(NamedTuple):
    """How a run's arrays hold the canonical ones."""

    name: str
    places: Places


def layout_of(
    model: ModelConfig, order: Order = None, *, owners: Sequence[str] = (), several: Sequence[str] = ()
) -> Layout:
    """The layout of a run: layers stacked by segment, in a pipeline's `order`, vocabulary padded.

    The arrays under the names `several` have a leading dimension, one for each of `owners`: what stands before the
    canonical names of its own (`replica/3`).
    """
    named = partial(places, model=model, order=order)

    def of_owners(path: str, shape: tuple[int, ...]) -> list[tuple[str, Index]]:
        if path.split("/")[0] not in several:
            return named(path, shape)
        one = named(path, shape[1:])
        return [(f"{owner}/{name}", (number, *index)) for number, owner in enumerate(owners) for name, index in one]

    stages = "" if order is None else f" as {','.join(map(str, order))}"
    return Layout(f"stacked{stages}", of_owners if owners else named)


def whole(shape: Sequence[int], indices: Sequence[Index]) -> bool:
    """Whether the disjoint logical arrays at `indices` make up all of a run's array."""
    sizes = [volume(tuple((0, size) for size in logical_shape(shape, index))) for index in indices]
    return sum(sizes) == volume(tuple((0, size) for size in shape))


def converted(
    stored: Mapping[str, jax.Array], manifest: Manifest, *, shapes: Mapping[str, Any], layout: Layout
) -> dict[str, jax.Array]:
    """The run's arrays by path, shaped as `shapes`, from the arrays of a checkpoint by path; padding is zero.

    A run's array that holds no canonical one (optax remembers nothing there) is taken over where shapes agree.
    """
    result = {}
    for path, like in shapes.items():
        named = layout.places(path, tuple(like.shape))
        if not named and path in stored and stored[path].shape == like.shape:
            result[path] = stored[path]
            continue
        array = jnp.zeros(like.shape, like.dtype)
        for name, index in named:
            entry = manifest.arrays[name]
            array = array.at[index].set(stored[entry.path][decoded(entry.index)])
        result[path] = array
    return result
