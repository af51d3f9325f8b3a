"""Which mesh axis each named dimension is sharded over: one table for weights, one for activations.

Weights carry logical names from `models/logical_axes.py`; the optimizer's state takes the sharding of the weight it
belongs to. Under ZeRO-1 (`mesh.zero: 1`) only that state is sharded over `fsdp`.
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
    """Mesh axes for dimensions called `names`. ValueError where one does not fit; key-value heads are repeated."""
    return PartitionSpec(
        *(fitting(rules[name] if name else None, name, size, mesh) for name, size in zip(names, shape, strict=True))
    )


def fitting(axes: Axes, name: str | None, size: int, mesh: Mesh) -> Axes:
    """`axes` of more than one device, where their product divides `size`; None for heads and layers that it does not.

    Layers in a pipeline's order always divide; in their plain order they stay on every stage, until they are dealt out.
    """
    wanted = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if mesh.shape[axis] > 1)
    product = math.prod(mesh.shape[axis] for axis in wanted)
    if product == 1:
        return None
    if size % product == 0:
        return wanted[0] if len(wanted) == 1 else wanted
    if name in ("kv_heads", "layers"):
        return None
    raise ValueError(f"dimension {name} of size {size} cannot be sharded over {' x '.join(wanted)} ({product} devices)")


def weight_spec(path: str, shape: tuple[int, ...], *, mesh: Mesh, zero: int) -> PartitionSpec:
    """The sharding of the weight at `path`; `zero` 1 leaves out `fsdp`."""
    names = axis_names(path) if len(shape) else ()
    names = ((None,) * (len(shape) - len(names) - is_stacked(path)) + names)[: len(shape) - is_stacked(path)]
    rules = WEIGHT_RULES | {"embed": None} if zero == 1 else WEIGHT_RULES
    inner = partition_spec(names, shape=shape[is_stacked(path) :], mesh=mesh, rules=rules)
    return PartitionSpec(*([fitting(rules["layers"], "layers", shape[0], mesh)] if is_stacked(path) else []), *inner)


def weight_shardings(params: Any, *, mesh: Mesh, zero: int) -> Any:
    """A tree like `params` (arrays or shapes) of `NamedSharding`s."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, weight_spec(path_name(path), leaf.shape, mesh=mesh, zero=zero)), params
    )


def optimizer_shardings(opt_state: Any, params: Any, *, mesh: Mesh) -> Any:
    """A tree like `opt_state`: subtrees shaped like `params` are sharded like fully sharded weights, the rest repeated.

    Left to itself the partitioner would repeat all of it. Factored statistics (adafactor's rows and columns: a weight's
    shape without one dimension) keep the sharding of the dimensions they have.
    """
    weights = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        owner = next((weight for weight in weights if name.endswith("/" + weight)), None)
        if owner is None:
            return NamedSharding(mesh, PartitionSpec())
        whole = weight_spec(owner, weights[owner], mesh=mesh, zero=3)
        return NamedSharding(mesh, statistic_spec(whole, weights[owner], leaf.shape))

    return jax.tree_util.tree_map_with_path(one, opt_state)


def statistic_spec(whole: PartitionSpec, shape: tuple[int, ...], own: tuple[int, ...]) -> PartitionSpec:
    """The sharding of an array of shape `own` beside a weight of `shape` that is sharded as `whole`."""
    if own == shape:
        return whole
    for gone in reversed(range(len(shape))):
        if own == shape[:gone] + shape[gone + 1 :]:
            return PartitionSpec(*whole[:gone], *whole[gone + 1 :])
    return PartitionSpec()


def batch_shardings(mesh: Mesh, fields: Iterable[str] = BATCH_FIELDS) -> dict[str, NamedSharding]:
    """Where each [global_batch, sequence, ...] array of a batch lives."""
    return {field: NamedSharding(mesh, PartitionSpec(("replica", "data", "fsdp"), "seq")) for field in fields}


def constrainer(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """`constrain(x, names)` for activations on `mesh`. Specs, not shardings: it also runs inside a shard_map.

    There the axes that the map took are left out: what they cut is cut already.
    """

    def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        taken = manual_axes()
        rules = (
            {name: exclude_axes(axes, taken) for name, axes in ACTIVATION_RULES.items()} if taken else ACTIVATION_RULES
        )
        return jax.lax.with_sharding_constraint(x, partition_spec(names, shape=x.shape, mesh=mesh, rules=rules))

    return constrain


def manual_axes() -> set[str]:
    """Mesh axes of the `shard_map` that is being traced; none outside of one."""
    mesh = jax.sharding.get_abstract_mesh()
    manual = jax.sharding.AxisType.Manual
    return {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == manual}


def exclude_axes(axes: Axes, taken: set[str]) -> Axes:
    """`axes` that are not `taken`; None where none is left."""
    left = tuple(axis for axis in ((axes,) if isinstance(axes, str) else axes or ()) if axis not in taken)
    return left or None


def shard_count(name: str) -> int:
    """How often the mesh in use (`jax.set_mesh`) cuts the activation dimension `name`; 1 without a mesh.

    Inside a `shard_map` an axis that it took counts no more: the dimension is cut already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = (ACTIVATION_RULES[name],) if isinstance(ACTIVATION_RULES[name], str) else ACTIVATION_RULES[name]
    automatic = jax.sharding.AxisType.Auto
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return math.prod(mesh.shape[axis] for axis in axes if kinds.get(axis) == automatic)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of abstract arrays: the shape and dtype of each leaf of `shapes`, with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as `a/b/0/c`."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
