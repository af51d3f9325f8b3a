"""Bars of the compiled plan: what a device's memory holds, and what it sends over each mesh axis every step."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from .markup import format_bytes, render


def memory_section(plan: Mapping[str, Any]) -> Markup:
    """One stacked bar of a device's memory during a step, and the numbers behind it."""
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
    """Bytes of one device by what they are for, from a plan that may lack some of it."""
    compiled = plan.get("compiled") or {}
    parts = {name: float(plan[name]["bytes_per_device"]) for name in ("parameters", "optimizer") if name in plan}
    state = sum(parts.values())
    if (arguments := compiled.get("argument_bytes")) is not None:
        parts["batch and the rest of the state"] = max(arguments - state, 0)
    if (temporary := compiled.get("temporary_bytes")) is not None:
        parts["gradients and temporaries"] = temporary
    return parts


def communication_section(plan: Mapping[str, Any]) -> Markup:
    """A bar for each set of mesh axes, stacked by kind of collective, all to one scale."""
    by_axes: dict[str, dict[str, float]] = {}
    for kind, axes_bytes in (plan.get("collectives") or {}).items():
        for axes, count in axes_bytes.items():
            if count > 0 and axes != "none":  # between no two devices
                by_axes.setdefault(axes, {})[kind] = count
    kinds = sorted({kind for parts in by_axes.values() for kind in parts})
    sums = {axes: sum(parts.values()) for axes, parts in by_axes.items()}
    rows = [
        (axes.replace("+", " + "), {kind: by_axes[axes].get(kind, 0) for kind in kinds})
        for axes in sorted(sums, key=sums.__getitem__, reverse=True)
    ]
    totals = {kind: sum(parts.get(kind, 0) for parts in by_axes.values()) for kind in kinds}
    return render("communication", rows=rows, totals=totals, longest=max(sums.values(), default=0))
