"""How arrays are cut over the mesh: a few weights as boxes with their cuts, and a table of all of them.

Arrays come from plan.json: {"name", "shape", "dtype", "spec", "bytes_per_device"}; `spec` has a mesh axis, a list of
them, or null for each dimension, and may be shorter than the shape. Layers that are cut alike are one row of the table.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ...models.logical_axes import axis_names
from .markup import render

# Weights drawn as boxes, by the end of their names: the table, and a column- and a row-parallel map.
DRAWN = ("embed/embedding", "attn/q/kernel", "mlp/up/kernel", "mlp/down/kernel")
BOX = 150  # pixels of a box's longer side
MOST_CUTS = 16  # of one side; more would be a grey surface


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
        """From its entry in plan.json."""
        shape = tuple(entry["shape"])
        spec = [*(entry.get("spec") or ()), *[None] * len(shape)][: len(shape)]
        axes = tuple((axis,) if isinstance(axis, str) else tuple(axis or ()) for axis in spec)
        return cls(entry["name"], shape, str(entry["dtype"]), axes, int(entry["bytes_per_device"]))

    @property
    def names(self) -> tuple[str | None, ...]:
        """Logical name of each dimension; leading ones of a stack are layers."""
        own = axis_names(self.name)
        stack = len(self.shape) - len(own)
        return (*("layers",) * stack, *own) if stack >= 0 else (None,) * len(self.shape)

    @property
    def of_weights(self) -> bool:
        """Whether this is a parameter and not the optimizer's."""
        return self.name.split("/")[0] not in ("opt_state", "optimizer", "outer", "rng", "step")


def sharding_picture(arrays: Iterable[Mapping[str, Any]], sizes: Mapping[str, int]) -> Markup:
    """Boxes, the table of parameters, and the rest of the state folded away. `sizes`: mesh axis -> size."""
    known = [Array.from_plan(entry) for entry in arrays]
    weights = [array for array in known if array.of_weights]
    others = [array for array in known if not array.of_weights]
    boxes = [drawn for suffix in DRAWN for drawn in [weight_box(first(weights, suffix), sizes)] if drawn is not None]
    return render(
        "sharding",
        boxes=boxes,
        weights=arrays_table(weights),
        others=arrays_table(others) if others else None,
        count=len(others),
    )


def first(arrays: Sequence[Array], suffix: str) -> Array | None:
    """The first array whose name ends so."""
    return next((array for array in arrays if array.name.endswith(suffix)), None)


def weight_box(array: Array | None, sizes: Mapping[str, int]) -> Markup | None:
    """The weight's matrix as a box: its first own dimension downwards, the others across. None where it has fewer."""
    own = len(axis_names(array.name)) if array else 0
    if array is None or own < 2:
        return None
    shape, axes, names = array.shape[-own:], array.axes[-own:], array.names[-own:]
    # attn/o has its heads first: what is cut together stays together
    split = 1 if names[0] != "heads" else own - 1
    tall, wide = math.prod(shape[:split]), math.prod(shape[split:])
    down, across = (cuts(part, sizes) for part in (axes[:split], axes[split:]))
    scale = BOX / max(tall, wide)
    height, width = max(tall * scale, 26), max(wide * scale, 26)
    rows, columns = min(down, MOST_CUTS), min(across, MOST_CUTS)
    return render(
        "box",
        name="/".join(array.name.removeprefix("params/").split("/")[-3:]),
        rows_are=side(names[:split], tall, axes[:split], sizes),
        columns_are=side(names[split:], wide, axes[split:], sizes),
        width=width,
        height=height,
        down=down,
        across=across,
        rows=rows,
        columns=columns,
        wide=width / columns,
        tall=height / rows,
    )


def cuts(axes: Iterable[Sequence[str]], sizes: Mapping[str, int]) -> int:
    """Pieces that these dimensions are cut into."""
    return math.prod(sizes.get(axis, 1) for group in axes for axis in group)


def side(names: Sequence[str | None], length: int, axes: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> str:
    """`heads × head_dim 192, tensor 2`."""
    words = " × ".join(name or "—" for name in names) + f" {length}"
    return ", ".join([words, *(f"{axis} {sizes.get(axis, 1)}" for group in axes for axis in group)])


def arrays_table(arrays: Sequence[Array]) -> Markup:
    """The table; arrays that differ only in their layer's number share a row."""
    groups: dict[tuple[Any, ...], list[Array]] = {}
    for array in arrays:
        pattern = re.sub(r"/\d+(?=/)", "/*", array.name)
        groups.setdefault((pattern, array.shape, array.dtype, array.axes), []).append(array)
    named = [(pattern if len(group) > 1 else group[0].name, group) for (pattern, *_), group in groups.items()]
    return render("arrays", groups=named)
