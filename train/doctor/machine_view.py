"""What the doctor found, for a terminal: sections of small tables, with a remedy for each problem."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..report.markup import format_bytes
from .findings import Device, Examination, Extra, Host, Problem

MARKS = {"right": ("✓", "green"), "wrong": ("✗", "bold red"), "unavailable": ("–", "yellow")}


def render(examination: Examination) -> Group:
    """Everything that the doctor prints."""
    checks = []
    for check in examination.checks:
        mark, style = MARKS[check.outcome]
        took = f" ({1000 * check.seconds:.2f} ms)" if check.seconds is not None else ""
        checks.append(Text.assemble((f"{mark} ", style), check.name, f": {check.detail}{took}"))
    return Group(
        section("Versions", facts({name: version or "missing" for name, version in examination.versions.items()})),
        section("Machine", facts(host_facts(examination.host))),
        section("Devices", devices_table(examination.devices)),
        section("Checks", *(checks or [Text("none: there is no device")])),
        section("What is missing for what", extras_table(examination.extras)),
        problem_section("Problems", examination.problems, empty="none"),
    )


def problem_section(title: str, problems: Sequence[Problem], *, empty: str) -> Group:
    """Each problem with its remedy; `empty` is what it says where there is none."""
    lines = [Text.assemble(("! ", "bold red"), p.what, "\n  ", ("→ " + p.remedy, "cyan")) for p in problems]
    return section(title, *(lines or [Text(empty, style="green")]))


def section(title: str, *parts: RenderableType) -> Group:
    """`parts`, indented, under a heading."""
    return Group(Text(title, style="bold"), Padding(Group(*parts), (0, 0, 1, 2)))


def facts(values: Mapping[str, str]) -> Table:
    """Names and values in two columns."""
    grid = Table.grid(padding=(0, 2))
    for name, value in values.items():
        grid.add_row(name, value)
    return grid


def host_facts(host: Host) -> dict[str, str]:
    """The host's facts, name -> text."""
    return {
        "system": host.system,
        "python": host.python,
        "cores": f"{host.cores} ({' '.join(host.cpu_features) or 'features not known'})",
        "memory": format_bytes(host.memory_bytes),
        "free disk": format_bytes(host.disk_free_bytes),
        "compilation cache": f"{host.compilation_cache} ({format_bytes(host.compilation_cache_bytes)})",
        "gloo": "yes" if host.gloo else "no",
        "XLA_FLAGS": host.xla_flags or "not set",
    }


def devices_table(devices: Sequence[Device]) -> Table:
    """A row for devices that are alike, and how many there are."""
    grid = Table("count", "kind", "platform", "memory kinds", "memory", box=None, pad_edge=False)
    counts: dict[tuple[Any, ...], int] = {}
    for device in devices:
        key = (device.kind, device.platform, device.memory_kinds, device.memory_bytes)
        counts[key] = counts.get(key, 0) + 1
    for (kind, name, memory_kinds, memory), count in counts.items():
        grid.add_row(str(count), kind, name, " ".join(memory_kinds), format_bytes(memory) if memory else "the host's")
    return grid


def extras_table(extras: Sequence[Extra]) -> Table:
    """A row an optional part."""
    grid = Table("extra", "for", "", box=None, pad_edge=False)
    for extra in extras:
        state = Text(extra.remedy, style="cyan") if extra.missing else Text("installed", style="green")
        grid.add_row(extra.name, extra.purpose, state)
    return grid
