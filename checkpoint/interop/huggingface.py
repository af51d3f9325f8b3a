"""A run's parameters from a Hugging Face directory, and back: no host ever holds the whole model.

Reading asks the files for exactly what each device will hold; writing gathers one shard file at a time.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...configs.huggingface import FORMATS
from ...configs.sections.model import ModelConfig
from ...models.families import safetensors_files as storage
from ...models.families.tensor_regions import Index, assemble_tensor, find_region, regions_by_tensor
from ...parallel.layout import canonical_slices
from ...parallel.sharding import path_name

Shapes = dict[str, tuple[int, ...]]


def canonical_shapes(params: Any, model: ModelConfig) -> Shapes:
    """Canonical name -> shape of every array of `params` (arrays or shapes, in the run's layout)."""
    return {
        name: sub_shape(leaf.shape, index)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        for name, index in canonical_slices(path_name(path), leaf.shape, model)
    }


def sub_shape(shape: tuple[int, ...], index: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of `array[index]`, for integers and slices.

    >>> sub_shape((4, 8, 3), (2, slice(5)))
    (5, 3)
    """
    index = (*index, *[slice(None)] * (len(shape) - len(index)))
    return tuple(
        len(range(*cut.indices(size))) for cut, size in zip(index, shape, strict=True) if isinstance(cut, slice)
    )


def format_kind(model: ModelConfig) -> str:
    """The model_type whose tables hold the weights of the model's family."""
    return next(kind for kind, form in FORMATS.items() if form.family == model.family)


def check_files(directory: str | Path, model: ModelConfig, *, shapes: Any) -> None:
    """Raise UserError where the files in `directory` are not the model that `model` describes; reads no weight."""
    canonical = canonical_shapes(shapes, model)
    wanted = [find_region(name, canonical, kind=format_kind(model)) for name in canonical]
    files = storage.WeightFiles(directory)
    storage.check_complete(files, {place.tensor: place.tensor_shape for place in wanted}, tied=model.tied_embeddings)


def fingerprint(directory: str | Path) -> str:
    """Tells the weights in `directory` from any other model's; see `Files.fingerprint`."""
    return storage.WeightFiles(directory).fingerprint()


def read(directory: str | Path, model: ModelConfig, *, shapes: Any, shardings: Any) -> Any:
    """Parameters from the files in `directory`, placed by `shardings`; `shapes` are the run's. Padding is zero.

    Raises as `check`.
    """
    check_files(directory, model, shapes=shapes)
    files = storage.WeightFiles(directory)
    canonical = canonical_shapes(shapes, model)
    where = {name: find_region(name, canonical, kind=format_kind(model)) for name in canonical}

    def leaf(path: tuple[Any, ...], like: Any, sharding: Any) -> jax.Array:
        pieces = canonical_slices(path_name(path), like.shape, model)

        def block(index: Index) -> np.ndarray:
            result = np.zeros(sub_shape(like.shape, index), like.dtype)
            for name, at in pieces:
                if (met := intersect_regions(at, index, like.shape)) is not None:
                    ours, theirs = met
                    place = where[name]
                    result[ours] = place.read(lambda part, tensor=place.tensor: files.read_region(tensor, part), theirs)
            return result

        return jax.make_array_from_callback(like.shape, sharding, block)

    return jax.tree_util.tree_map_with_path(leaf, shapes, shardings)


def intersect_regions(
    at: tuple[Any, ...], index: Index, shape: tuple[int, ...]
) -> tuple[tuple[Any, ...], Index] | None:
    """Where a piece that lies `at` in an array of `shape` and the block `index` of the array meet: in block and piece.

    None where they do not.

    >>> meeting((2,), (slice(1, 4), slice(0, 8)), (6, 8))
    ((1, slice(0, 8, None)), (slice(0, 8, None),))
    """
    in_block, in_piece = [], []
    for size, cut, wanted in zip(shape, (*at, *[slice(None)] * (len(shape) - len(at))), index, strict=True):
        start, stop, _ = wanted.indices(size)
        if not isinstance(cut, slice):
            if not start <= cut < stop:
                return None
            in_block.append(cut - start)
            continue
        first, last, _ = cut.indices(size)
        low, high = max(first, start), min(last, stop)
        if low >= high:
            return None
        in_block.append(slice(low - start, high - start))
        in_piece.append(slice(low - first, high - first))
    return tuple(in_block), tuple(in_piece)


def write(params: Any, model: ModelConfig, directory: Path, *, kind: str, limit: int) -> list[Path]:
    """Write `params` (in the run's layout) as files of format `kind`, each of at most `limit` bytes; their paths."""
    shapes, fetch = canonical_shapes(params, model), host_fetcher(params, model)
    parts = regions_by_tensor(shapes, kind=kind)
    width = {path.dtype.itemsize for path in jax.tree.leaves(params)}
    sizes = {tensor: math.prod(held[0][1].tensor_shape) * max(width) for tensor, held in parts.items()}
    return storage.write_shards(directory, sizes, lambda tensor: assemble_tensor(parts[tensor], fetch), limit=limit)


def host_fetcher(params: Any, model: ModelConfig) -> Callable[[str], np.ndarray]:
    """Canonical name -> the array, brought to the host when it is asked for."""
    found: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
        name: (leaf, index)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        for name, index in canonical_slices(path_name(path), leaf.shape, model)
    }

    def fetch(name: str) -> np.ndarray:
        leaf, index = found[name]
        return np.asarray(leaf[index])

    return fetch
