"""The mesh axes that each named dimension is sharded over: one table for weights, one for activations.

Weights have logical names from `models/logical_axes.py`; optimizer state is sharded like the weight that it belongs to.
Under ZeRO-1 (`mesh.zero: 1`) only that state is sharded over `fsdp`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..configs.names import BATCH_FIELDS
from ..models.logical_axes import axis_names, is_stacked

Axes = str | tuple[str, ...] | None

WEIGHT_RULES: dict[str, Axes] = {
    "vocab": ("pipe", "tensor"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "layers": "pipe",
}

ACTIVATION_RULES: dict[str, Axes] = {
    "batch": ("data", "fsdp"),
    "sequence": "seq",
    "block_sequence": ("seq", "tensor"),  # between blocks, where every token is computed once (arXiv:2205.05198)
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


def partition_spec(
    names: tuple[str | None, ...], *, shape: tuple[int, ...], mesh: Mesh, rules: Mapping[str, Axes]
) -> PartitionSpec:
    """The spec of an array whose dimensions have `names`. ValueError if an axis does not divide its dimension."""
    axes = (rules[name] if name else None for name in names)
    return PartitionSpec(*(dimension_axes(*dimension, mesh) for dimension in zip(axes, names, shape, strict=True)))


def dimension_axes(axes: Axes, name: str | None, size: int, mesh: Mesh) -> Axes:
    """Those of `axes` with more than one device; None for key-value heads and layers that they do not divide.

    Layers in a pipeline's order always divide; in plain order they are replicated, until `reorder_layers` splits them.
    """
    used = tuple(axis for axis in as_tuple(axes) if mesh.shape[axis] > 1)
    product = math.prod(mesh.shape[axis] for axis in used)
    if product == 1:
        return None
    if size % product == 0:
        return used[0] if len(used) == 1 else used
    if name in ("kv_heads", "layers"):
        return None
    raise ValueError(f"dimension {name} of size {size} cannot be sharded over {' x '.join(used)} ({product} devices)")


def as_tuple(axes: Axes) -> tuple[str, ...]:
    """`axes` as a tuple of names."""
    return (axes,) if isinstance(axes, str) else axes or ()


def weight_spec(path: str, shape: tuple[int, ...], *, mesh: Mesh, zero: int) -> PartitionSpec:
    """The sharding of the weight at `path`; `zero` 1 leaves out `fsdp`."""
    names = axis_names(path) if len(shape) else ()
    names = ((None,) * (len(shape) - len(names) - is_stacked(path)) + names)[: len(shape) - is_stacked(path)]
    rules = WEIGHT_RULES | {"embed": None} if zero == 1 else WEIGHT_RULES
    spec = partition_spec(names, shape=shape[is_stacked(path) :], mesh=mesh, rules=rules)
    if not is_stacked(path):
        return spec
    return PartitionSpec(dimension_axes(rules["layers"], "layers", shape[0], mesh), *spec)


def weight_shardings(params: Any, *, mesh: Mesh, zero: int) -> Any:
    """A tree like `params` (arrays or shapes) of `NamedSharding`s."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, weight_spec(path_name(path), leaf.shape, mesh=mesh, zero=zero)), params
    )


def optimizer_shardings(opt_state: Any, params: Any, *, mesh: Mesh) -> Any:
    """A tree like `opt_state`: subtrees shaped like `params` sharded like fully sharded weights, all else replicated.

    Without it the partitioner would replicate everything. Factored statistics (adafactor's rows and columns: a weight's
    shape without one dimension) keep the sharding of the dimensions that they have.
    """
    weights = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        owner = next((weight for weight in weights if name.endswith("/" + weight)), None)
        if owner is None:
            return NamedSharding(mesh, PartitionSpec())
        spec = weight_spec(owner, weights[owner], mesh=mesh, zero=3)
        return NamedSharding(mesh, statistic_spec(spec, weights[owner], leaf.shape))

    return jax.tree_util.tree_map_with_path(leaf_sharding, opt_state)


def statistic_spec(spec: PartitionSpec, weight_shape: tuple[int, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The spec of a statistic of `shape`, from that of its weight, whose shape may have one dimension more."""
    if shape == weight_shape:
        return spec
    for missing in reversed(range(len(weight_shape))):
        if shape == weight_shape[:missing] + weight_shape[missing + 1 :]:
            return PartitionSpec(*spec[:missing], *spec[missing + 1 :])
    return PartitionSpec()


def batch_shardings(mesh: Mesh, fields: Iterable[str] = BATCH_FIELDS) -> dict[str, NamedSharding]:
    """The sharding of each array [global_batch, sequence, ...] of a batch."""
    return {field: NamedSharding(mesh, PartitionSpec(("replica", "data", "fsdp"), "seq")) for field in fields}


def constrainer(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """`constrain(x, names)` for activations on `mesh`. Specs, not shardings: it also runs inside a `shard_map`.

    There it leaves out the map's manual axes: arrays are already split over them.
    """

    def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        manual = manual_axes()
        rules = {name: exclude_axes(axes, manual) for name, axes in ACTIVATION_RULES.items()}
        return jax.lax.with_sharding_constraint(x, partition_spec(names, shape=x.shape, mesh=mesh, rules=rules))

    return constrain


def manual_axes() -> set[str]:
    """The manual axes of the `shard_map` that is being traced; none outside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual
    return {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == manual}


def exclude_axes(axes: Axes, excluded: set[str]) -> Axes:
    """Those of `axes` that are not `excluded`; None if none is left."""
    return tuple(axis for axis in as_tuple(axes) if axis not in excluded) or None


def shard_count(name: str) -> int:
    """The number of shards of the activation dimension `name` on the mesh in use (`jax.set_mesh`); 1 without a mesh.

    Inside a `shard_map` its manual axes do not count: the dimension is already split over them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = jax.sharding.AxisType.Auto
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return math.prod(mesh.shape[axis] for axis in as_tuple(ACTIVATION_RULES[name]) if kinds.get(axis) == automatic)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of abstract arrays: the shape and dtype of each leaf of `shapes`, with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as `a/b/0/c`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map `function(path_name, leaf, ...)` over the leaves of `tree`, with those of further trees like it."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_name(path), *leaves), tree, *rest)
