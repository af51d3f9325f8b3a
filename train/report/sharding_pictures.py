"""Pictures of shardings: a few weights as boxes divided into shards, and a table of all arrays.

Arrays come from plan.json: {"name", "shape", "dtype", "spec", "bytes_per_device"}; `spec` has a mesh axis, a list of
them, or null for each dimension, and may be shorter than the shape. Layers with one sharding share a row of the table.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ...models.logical_axes import axis_names
from .markup import render

# Weights drawn as boxes, by suffix: the embedding, and column-parallel and row-parallel kernels.
DRAWN = ("embed/embedding", "attn/q/kernel", "mlp/up/kernel", "mlp/down/kernel")
BOX = 150  # pixels of the longer side of a box
MOST_SHARDS = 16  # drawn along a side


@dataclass(frozen=True)
class Array:
    """One array of the plan."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[tuple[str, ...], ...]  # mesh axes of each dimension
    bytes_per_device: int

    @classmethod
    def from_plan(cls, entry: Mapping[str, Any]) -> "Array":
        """Read an entry of plan.json."""
        shape = tuple(entry["shape"])
        spec = [*(entry.get("spec") or ()), *[None] * len(shape)][: len(shape)]
        axes = tuple((axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in spec)
        return cls(entry["name"], shape, str(entry["dtype"]), axes, int(entry["bytes_per_device"]))

    @property
    def names(self) -> tuple[str | None, ...]:
        """The logical axis of each dimension; leading dimensions of a stack are layers."""
        names = axis_names(self.name)
        stack = len(self.shape) - len(names)
        return (*("layers",) * stack, *names) if stack >= 0 else (None,) * len(self.shape)

    @property
    def is_weight(self) -> bool:
        """Whether this is a weight, not state of an optimizer."""
        return self.name.split("/")[0] not in ("opt_state", "optimizer", "outer", "rng", "step")


def sharding_picture(arrays: Iterable[Mapping[str, Any]], sizes: Mapping[str, int]) -> Markup:
    """Boxes, a table of weights, and a folded table of other arrays. `sizes`: mesh axis -> size."""
    arrays = [Array.from_plan(entry) for entry in arrays]
    weights = [array for array in arrays if array.is_weight]
    others = [array for array in arrays if not array.is_weight]
    drawn = [next((array for array in weights if array.name.endswith(suffix)), None) for suffix in DRAWN]
    return render(
        "sharding",
        boxes=[weight_box(array, sizes) for array in drawn if array and len(axis_names(array.name)) >= 2],
        weights=arrays_table(weights),
        others=arrays_table(others) if others else None,
        count=len(others),
    )


def weight_box(array: Array, sizes: Mapping[str, int]) -> Markup:
    """Draw a kernel, without the dimension of layers, as a box: input dimensions downwards, output ones across."""
    rank = len(axis_names(array.name))
    shape, axes, names = array.shape[-rank:], array.axes[-rank:], array.names[-rank:]
    split = 1 if names[0] != "heads" else rank - 1  # attn/o has heads and head_dim as input
    tall, wide = math.prod(shape[:split]), math.prod(shape[split:])
    down, across = (
        math.prod(sizes.get(axis, 1) for group in part for axis in group) for part in (axes[:split], axes[split:])
    )
    scale = BOX / max(tall, wide)
    height, width = max(tall * scale, 26), max(wide * scale, 26)
    rows, columns = min(down, MOST_SHARDS), min(across, MOST_SHARDS)
    return render(
        "box",
        name="/".join(array.name.removeprefix("params/").split("/")[-3:]),
        rows_are=side_label(names[:split], tall, axes[:split], sizes),
        columns_are=side_label(names[split:], wide, axes[split:], sizes),
        width=width,
        height=height,
        down=down,
        across=across,
        rows=rows,
        columns=columns,
        wide=width / columns,
        tall=height / rows,
    )


def side_label(
    names: Sequence[str | None], length: int, axes: Sequence[Sequence[str]], sizes: Mapping[str, int]
) -> str:
    """The label of a side: `heads × head_dim 192, tensor 2`."""
    dimensions = " × ".join(name or "—" for name in names) + f" {length}"
    return ", ".join([dimensions, *(f"{axis} {sizes.get(axis, 1)}" for group in axes for axis in group)])


def arrays_table(arrays: Sequence[Array]) -> Markup:
    """The table of arrays; those that differ only in the number of their layer share a row."""
    groups: dict[tuple[Any, ...], list[Array]] = {}
    for array in arrays:
        pattern = re.sub(r"/\d+(?=/)", "/*", array.name)
        groups.setdefault((pattern, array.shape, array.dtype, array.axes), []).append(array)
    named = [(pattern if len(group) > 1 else group[0].name, group) for (pattern, *_), group in groups.items()]
    return render("arrays", groups=named)
