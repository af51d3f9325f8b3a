"""Bars of the compiled plan: the memory of a device, and the bytes that it receives over each mesh axis in a step."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from .markup import format_bytes, render


def memory_section(plan: Mapping[str, Any]) -> Markup:
    """A stacked bar of a device's memory during a step, and its numbers."""
    parts = {name: count for name, count in device_parts(plan).items() if count > 0}
    compiled = plan.get("compiled") or {}
    rows = [
        (label, format_bytes(compiled[key]))
        for key, label in (
            ("argument_bytes", "arguments: state and batch"),
            ("output_bytes", "results: new state and metrics"),
            ("alias_bytes", "results written over arguments"),
            ("temporary_bytes", "temporaries"),
            ("peak_bytes", "all at once"),
        )
        if compiled.get(key) is not None
    ]
    state = [
        (name.title(), format_bytes(plan[name]["bytes"]), format_bytes(plan[name]["bytes_per_device"]))
        for name in ("parameters", "optimizer")
        if name in plan
    ]
    return render("memory", parts=parts, compiled=rows, state=state)


def device_parts(plan: Mapping[str, Any]) -> dict[str, float]:
    """The bytes of one device by use; parts that the plan lacks are left out."""
    compiled = plan.get("compiled") or {}
    parts = {name: float(plan[name]["bytes_per_device"]) for name in ("parameters", "optimizer") if name in plan}
    state = sum(parts.values())
    if (arguments := compiled.get("argument_bytes")) is not None:
        parts["batch and the rest of the state"] = max(arguments - state, 0)
    if (temporary := compiled.get("temporary_bytes")) is not None:
        parts["gradients and temporaries"] = temporary
    return parts


def communication_section(plan: Mapping[str, Any]) -> Markup:
    """A bar for each set of mesh axes, stacked by kind of collective, all in one scale."""
    by_axes: dict[str, dict[str, float]] = {}
    for kind, axes_bytes in (plan.get("collectives") or {}).items():
        for axes, count in axes_bytes.items():
            if count > 0 and axes != "none":  # "none": groups of one device
                by_axes.setdefault(axes, {})[kind] = count
    kinds = sorted({kind for parts in by_axes.values() for kind in parts})
    sums = {axes: sum(parts.values()) for axes, parts in by_axes.items()}
    rows = [
        (axes.replace("+", " + "), {kind: by_axes[axes].get(kind, 0) for kind in kinds})
        for axes in sorted(sums, key=sums.__getitem__, reverse=True)
    ]
    totals = {kind: sum(parts.get(kind, 0) for parts in by_axes.values()) for kind in kinds}
    return render("communication", rows=rows, totals=totals, longest=max(sums.values(), default=0))
