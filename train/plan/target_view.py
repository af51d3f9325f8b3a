"""Plans of several targets, side by side, as tables for the terminal."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .compile_plan import size
from .step_parts import PARTS
from .target_plan import TargetPlan

LINES = 6  # of the source, in a table
SHORTEST = 0.005  # of a step, that a row is shown for


def render(plans: Sequence[TargetPlan]) -> RenderableType:
    """One table of all `plans`, then for each what takes the time, and what is not known."""
    return Group(comparison(plans), *(part for plan in plans for part in details(plan)))


def comparison(plans: Sequence[TargetPlan]) -> Table:
    """A column a target."""
    table = Table("", *(plan.target for plan in plans), title="Estimated by the compiler", title_justify="left")
    table.add_row(
        "mesh", *(" x ".join(f"{axis} {n}" for axis, n in plan.mesh.items()) or "one device" for plan in plans)
    )
    table.add_row("fits", *("yes" if plan.fits else "no" for plan in plans))
    table.add_row("peak of a device", *(memory(plan) for plan in plans))
    steps = [plan.step for plan in plans]
    table.add_row("step", *(seconds(step and step["seconds"]) for step in steps))
    table.add_row("MFU", *("-" if not step or step["mfu"] is None else f"{step['mfu']:.1%}" for step in steps))
    table.add_row("tokens a second", *("-" if not step else f"{step['tokens_per_second']:,.0f}" for step in steps))
    for part in PARTS:
        values = [step["seconds_by_part"].get(part, 0.0) if step else 0.0 for step in steps]
        if any(step and value > SHORTEST * step["seconds"] for step, value in zip(steps, values, strict=True)):
            name = "collectives, exposed" if part == "collectives" else part
            table.add_row(
                f"  {name}", *(seconds(value) if step else "-" for step, value in zip(steps, values, strict=True))
            )
    hidden = [step["collectives"]["hidden_seconds"] if step else None for step in steps]
    table.add_row("  (collectives, hidden)", *(seconds(value) for value in hidden))
    table.add_row("compiling took", *(f"{plan.compile_seconds:.0f} s" for plan in plans))
    return table


def memory(plan: TargetPlan) -> str:
    """Peak and limit of a device."""
    peak = "more" if plan.peak_bytes is None else size(plan.peak_bytes)
    return peak if plan.device_memory_bytes is None else f"{peak} of {size(plan.device_memory_bytes)}"


def seconds(value: float | None) -> str:
    """Seconds as milliseconds."""
    return "-" if value is None else f"{1e3 * value:,.1f} ms"


def details(plan: TargetPlan) -> list[RenderableType]:
    """Warnings, remedies, the longest source lines and synchronous collectives of a plan."""
    parts: list[RenderableType] = [Text(f"\n{plan.target}", style="bold")]
    parts += [Text(f"! {warning}", style="yellow") for warning in plan.warnings]
    if not plan.fits:
        parts += [Text(f"  fits with {change} ({size(peak)})", style="cyan") for change, peak in plan.savings.items()]
        if not plan.savings:
            parts.append(Text("  none of the changes that save memory makes it fit; use more devices", style="red"))
    if plan.step is not None:
        for place, value in list(plan.step["seconds_by_source"].items())[:LINES]:
            parts.append(Text(f"  {seconds(value):>12}  {place}"))
        for row in plan.step["collectives"]["synchronous"]:
            if row["seconds"] > SHORTEST * plan.step["seconds"]:
                what = f"synchronous {row['kind']} over {row['axes']}, {row['source']}"
                parts.append(Text(f"  {seconds(row['seconds']):>12}  {what}"))
        parts += [
            Text(f"  not in the sum: {what} ({count}x)", style="yellow") for what, count in plan.step["unknown"].items()
        ]
    return parts
