"""Reads and writes parameters in Hugging Face directories. No host ever holds the whole model.

Reading loads from the files exactly what each device will hold; writing gathers one tensor at a time.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...configs.huggingface import read_tables
from ...configs.sections.model import ModelConfig
from ...models.families import safetensors_files as storage
from ...models.families.huggingface_regions import Index, assemble_tensor, find_region, regions_by_tensor
from ...parallel.layout import canonical_slices
from ...parallel.sharding import path_name
from ..fingerprints import index_bounds, logical_shape

Shapes = dict[str, tuple[int, ...]]


def canonical_shapes(params: Any, model: ModelConfig) -> Shapes:
    """Return canonical name -> shape of every array in `params` (arrays or shapes, in the run layout)."""
    return {
        name: logical_shape(leaf.shape, index)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        for name, index in canonical_slices(path_name(path), leaf.shape, model)
    }


def format_kind(model: ModelConfig) -> str:
    """Return the Hugging Face `model_type` whose tables name the weights of the model's family."""
    return next(kind for kind, form in read_tables()[0].items() if form.family == model.family)


def check_files(directory: str | Path, model: ModelConfig, *, shapes: Any) -> None:
    """Raise UserError if the files in `directory` do not hold the model that `model` describes. Reads no weights."""
    canonical = canonical_shapes(shapes, model)
    regions = [find_region(name, canonical, kind=format_kind(model)) for name in canonical]
    files = storage.WeightFiles(directory)
    storage.check_complete(
        files, {region.tensor: region.tensor_shape for region in regions}, tied=model.tied_embeddings
    )


def fingerprint(directory: str | Path) -> str:
    """Return a string that identifies the weights in `directory`; see `Files.fingerprint`."""
    return storage.WeightFiles(directory).fingerprint()


def read(directory: str | Path, model: ModelConfig, *, shapes: Any, shardings: Any) -> Any:
    """Return the parameters in `directory` with the `shapes` of the run, on `shardings`. Padding is zero.

    Raises like `check_files`.
    """
    check_files(directory, model, shapes=shapes)
    files = storage.WeightFiles(directory)
    canonical = canonical_shapes(shapes, model)
    regions = {name: find_region(name, canonical, kind=format_kind(model)) for name in canonical}

    def leaf(path: tuple[Any, ...], like: Any, sharding: Any) -> jax.Array:
        slices = canonical_slices(path_name(path), like.shape, model)

        def block(index: Index) -> np.ndarray:
            result = np.zeros(logical_shape(like.shape, index), like.dtype)
            for name, at in slices:
                if (common := intersect_regions(at, index, like.shape)) is not None:
                    in_block, in_canonical = common
                    region = regions[name]
                    fetch = lambda part, tensor=region.tensor: files.read_region(tensor, part)
                    result[in_block] = region.read(fetch, in_canonical)
            return result

        return jax.make_array_from_callback(like.shape, sharding, block)

    return jax.tree_util.tree_map_with_path(leaf, shapes, shardings)


def intersect_regions(at: Index, block: Index, shape: tuple[int, ...]) -> tuple[Index, Index] | None:
    """Intersect the canonical array at index `at` of an array of `shape` with the `block` at slices of that array.

    Returns (index of the intersection in the block, its index in the canonical array), or None if it is empty.

    >>> intersect_regions((2,), (slice(1, 4), slice(0, 8)), (6, 8))
    ((1, slice(0, 8, None)), (slice(0, 8, None),))
    """
    in_block, in_canonical = [], []
    for ((first, last), is_slice), ((start, stop), _) in zip(
        index_bounds(shape, at), index_bounds(shape, block), strict=True
    ):
        low, high = max(first, start), min(last, stop)
        if low >= high:
            return None
        in_block.append(slice(low - start, high - start) if is_slice else low - start)
        if is_slice:
            in_canonical.append(slice(low - first, high - first))
    return tuple(in_block), tuple(in_canonical)


def write(params: Any, model: ModelConfig, directory: Path, *, kind: str, limit: int) -> list[Path]:
    """Write `params` (run layout) as files of format `kind`, each of at most `limit` bytes; return their paths."""
    shapes, fetch = canonical_shapes(params, model), host_fetcher(params, model)
    regions = regions_by_tensor(shapes, kind=kind)
    itemsize = max(leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    sizes = {tensor: math.prod(parts[0][1].tensor_shape) * itemsize for tensor, parts in regions.items()}
    return storage.write_shards(directory, sizes, lambda tensor: assemble_tensor(regions[tensor], fetch), limit=limit)


def host_fetcher(params: Any, model: ModelConfig) -> Callable[[str], np.ndarray]:
    """Return a function from a canonical name to the array, which it copies to the host."""
    sources: Mapping[str, tuple[Any, Index]] = {
        name: (leaf, index)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        for name, index in canonical_slices(path_name(path), leaf.shape, model)
    }

    def fetch(name: str) -> np.ndarray:
        leaf, index = sources[name]
        return np.asarray(leaf[index])

    return fetch
