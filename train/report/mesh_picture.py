"""A picture of the mesh: devices in a grid, each at its coordinates on the axes larger than one.

The last axis gives columns, the one before it rows, and every index of the others a panel: {data: 2, fsdp: 2,
tensor: 2} is two panels, data 0 and data 1, of two rows and two columns.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .markup import render

MOST_PANELS = 16  # drawn; the panels of a large mesh all look the same
PROCESS_TINTS = 6


def mesh_picture(sizes: Mapping[str, int], devices: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw a mesh with `sizes` (axis -> size); `devices` have id, kind, platform, process, in row-major order."""
    axes = {axis: size for axis, size in sizes.items() if size > 1}
    if not axes or math.prod(axes.values()) != len(devices):
        axes = {"device": len(devices)}
    # An axis that does not exist has the name "" and size 1.
    *outer, (row_axis, rows), (column_axis, columns) = [("", 1)] * (len(axes) < 2) + list(axes.items())
    indices = list(itertools.product(*(range(size) for _, size in outer)))
    panels = []
    for number, index in enumerate(indices[:MOST_PANELS]):
        first = number * rows * columns
        grid = [devices[first + row * columns :][:columns] for row in range(rows)]
        title = "  ".join(f"{axis} {value}" for (axis, _), value in zip(outer, index, strict=True))
        panels.append((title, grid))
    kinds = sorted({str(device.get("kind", device.get("platform", "?"))) for device in devices})
    processes = len({device.get("process", 0) for device in devices})
    shape = " × ".join(f"{axis} {size}" for axis, size in axes.items())
    note = f"{shape}; {len(devices)} × {', '.join(kinds)} in {processes} process{'es' if processes > 1 else ''}."
    return render(
        "mesh",
        note=note,
        panels=panels,
        hidden=len(indices) - len(panels),
        row_axis=row_axis,
        column_axis=column_axis,
        tints=PROCESS_TINTS,
    )
