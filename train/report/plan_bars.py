"""Bars of the compiled plan: what a device's memory holds, and what it sends over each mesh axis every step."""

from collections.abc import Mapping
from typing import Any

from .markup import Html, element, section, size, table

Parts = Mapping[str, float]  # what -> bytes


def memory(plan: Mapping[str, Any]) -> Html:
    """One stacked bar of a device's memory during a step, and the numbers behind it."""
    parts = {name: count for name, count in device_parts(plan).items() if count > 0}
    compiled = plan.get("compiled") or {}
    rows = [
        (label, size(compiled[key]))
        for key, label in (
            ("argument_bytes", "arguments: state and batch"),
            ("output_bytes", "results: new state and metrics"),
            ("alias_bytes", "results written over arguments"),
            ("temporary_bytes", "temporaries"),
            ("peak_bytes", "all at once"),
        )
        if compiled.get(key) is not None
    ]
    whole = [
        (name.title(), size(plan[name]["bytes"]), size(plan[name]["bytes_per_device"]))
        for name in ("parameters", "optimizer")
        if name in plan
    ]
    return section(
        "Memory of one device",
        bar(parts, whole=sum(parts.values())),
        legend(parts),
        element(
            "div",
            table(("Compiled step", "One device"), rows, numeric=("One device",)),
            table(("State", "All of it", "One device"), whole, numeric=("All of it", "One device")),
            class_="columns",
        ),
        note="What the compiled step holds at once. Temporaries are gradients, kept activations and buffers.",
    )


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


def communication(plan: Mapping[str, Any]) -> Html:
    """A bar for each set of mesh axes, stacked by kind of collective, all to one scale."""
    by_axes: dict[str, dict[str, float]] = {}
    for kind, axes_bytes in (plan.get("collectives") or {}).items():
        for axes, count in axes_bytes.items():
            if count > 0 and axes != "none":  # between no two devices
                by_axes.setdefault(axes, {})[kind] = count
    kinds = sorted({kind for parts in by_axes.values() for kind in parts})
    if not kinds:
        return section("Communication", element("p", "No collective runs: every device works alone.", class_="note"))
    longest = max(sum(parts.values()) for parts in by_axes.values())
    rows = [
        element(
            "div",
            element("span", axes.replace("+", " + "), class_="axis"),
            bar({kind: parts.get(kind, 0) for kind in kinds}, whole=longest),
            element("span", size(sum(parts.values())), class_="amount"),
            class_="barrow",
        )
        for axes, parts in sorted(by_axes.items(), key=lambda item: -sum(item[1].values()))
    ]
    totals = {kind: sum(parts.get(kind, 0) for parts in by_axes.values()) for kind in kinds}
    return section(
        "Communication",
        *rows,
        legend(totals),
        note="Bytes of the results one device receives in a step, by the mesh axes a collective runs over.",
    )


def bar(parts: Parts, *, whole: float) -> Html:
    """Coloured pieces, one after another, as wide as their share of `whole`."""
    pieces = []
    for number, (name, count) in enumerate(parts.items(), start=1):
        if count > 0:
            width = f"width:{100 * count / whole:.3f}%"
            pieces.append(element("i", class_=f"series-{number}", style=width, title=f"{name}: {size(count)}"))
    return element("div", *pieces, class_="bar")


def legend(parts: Parts) -> Html:
    """What each colour is, and how much of it there is."""
    keys = [
        element("span", element("i", class_=f"key series-{number}"), f"{name} ", element("b", size(count)))
        for number, (name, count) in enumerate(parts.items(), start=1)
    ]
    return element("p", *keys, class_="keys")
