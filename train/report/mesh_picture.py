"""The mesh as a picture: devices in a grid, each at its coordinates on the axes that are larger than one.

The last axis runs across, the one before it down, and every combination of the others is a panel of its own:
{data: 2, fsdp: 2, tensor: 2} is two panels, data 0 and data 1, of two rows and two columns.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .markup import render

MOST_PANELS = 16  # drawn; a mesh of thousands of devices looks alike everywhere
PROCESS_TINTS = 6


def mesh_picture(sizes: Mapping[str, int], devices: Sequence[Mapping[str, Any]]) -> Markup:
    """`sizes`: axis -> size in mesh order. `devices`: id, kind, platform, process, in the mesh's row-major order."""
    axes = {axis: size for axis, size in sizes.items() if size > 1}
    if not axes or math.prod(axes.values()) != len(devices):
        axes = {"device": len(devices)}
    outer, (row_axis, rows), (column_axis, columns) = folded(axes)
    places = list(itertools.product(*(range(size) for size in outer.values())))
    panels = []
    for number, place in enumerate(places[:MOST_PANELS]):
        first = number * rows * columns
        grid = [devices[first + row * columns :][:columns] for row in range(rows)]
        title = "  ".join(f"{axis} {index}" for axis, index in zip(outer, place, strict=True))
        panels.append((title, grid))
    kinds = sorted({str(device.get("kind", device.get("platform", "?"))) for device in devices})
    processes = len({device.get("process", 0) for device in devices})
    shape = " × ".join(f"{axis} {size}" for axis, size in axes.items())
    note = f"{shape}; {len(devices)} × {', '.join(kinds)} in {processes} process{'es' if processes > 1 else ''}."
    return render(
        "mesh",
        note=note,
        panels=panels,
        hidden=len(places) - len(panels),
        row_axis=row_axis,
        column_axis=column_axis,
        tints=PROCESS_TINTS,
    )


def folded(axes: Mapping[str, int]) -> tuple[dict[str, int], tuple[str, int], tuple[str, int]]:
    """(axes of the panels, axis down, axis across); an axis that is not there has the name "" and size 1."""
    names = list(axes)
    across = (names[-1], axes[names[-1]])
    down = (names[-2], axes[names[-2]]) if len(names) > 1 else ("", 1)
    return {name: axes[name] for name in names[:-2]}, down, across
