"""What the doctor found, for a terminal: sections of small tables, with a remedy beside whatever is wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..report.markup import size
from .findings import Device, Examination, Extra, Host

MARKS = {"right": ("✓", "green"), "wrong": ("✗", "bold red"), "unavailable": ("–", "yellow")}


def render(found: Examination) -> Group:
    """All of it."""
    checks = []
    for check in found.checks:
        mark, style = MARKS[check.outcome]
        took = f" ({1000 * check.seconds:.2f} ms)" if check.seconds is not None else ""
        checks.append(Text.assemble((f"{mark} ", style), check.name, f": {check.detail}{took}"))
    worries = [Text.assemble(("! ", "bold red"), p.what, "\n  ", ("→ " + p.remedy, "cyan")) for p in found.problems]
    return Group(
        titled("Versions", facts({name: known or "missing" for name, known in found.versions.items()})),
        titled("Machine", facts(host_facts(found.host))),
        titled("Devices", devices_table(found.devices)),
        titled("Checks", *(checks or [Text("none: there is no device")])),
        titled("What is missing for what", extras_table(found.extras)),
        titled("Problems", *(worries or [Text("none", style="green")])),
    )


def titled(title: str, *parts: RenderableType) -> Group:
    """Parts under a heading."""
    return Group(Text(title, style="bold"), Padding(Group(*parts), (0, 0, 1, 2)))


def facts(values: Mapping[str, str]) -> Table:
    """Names and values in two columns."""
    grid = Table.grid(padding=(0, 2))
    for name, value in values.items():
        grid.add_row(name, value)
    return grid


def host_facts(found: Host) -> dict[str, str]:
    """The machine in words."""
    return {
        "system": found.system,
        "python": found.python,
        "cores": f"{found.cores} ({' '.join(found.cpu_features) or 'features not known'})",
        "memory": size(found.memory_bytes),
        "free disk": size(found.disk_free_bytes),
        "compilation cache": f"{found.compilation_cache} ({size(found.compilation_cache_bytes)})",
        "gloo": "yes" if found.gloo else "no",
        "XLA_FLAGS": found.xla_flags or "not set",
    }


def devices_table(devices: Sequence[Device]) -> Table:
    """One row for devices that are alike."""
    grid = Table("count", "kind", "platform", "memory kinds", "memory", box=None, pad_edge=False)
    alike: dict[tuple[Any, ...], int] = {}
    for device in devices:
        key = (device.kind, device.platform, device.memory_kinds, device.memory_bytes)
        alike[key] = alike.get(key, 0) + 1
    for (kind, name, memory_kinds, memory), count in alike.items():
        grid.add_row(str(count), kind, name, " ".join(memory_kinds), size(memory) if memory else "the host's")
    return grid


def extras_table(extras: Sequence[Extra]) -> Table:
    """One row an optional part."""
    grid = Table("extra", "for", "", box=None, pad_edge=False)
    for part in extras:
        state = Text(part.remedy, style="cyan") if part.missing else Text("installed", style="green")
        grid.add_row(part.name, part.purpose, state)
    return grid
