"""What the self-test of many machines found, for a terminal: a row a process, the links, and who stands out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..launch.network_probe import Links
from ..report.markup import size
from .findings import Problem
from .machine_view import MARKS, titled

MOST = 16  # machines whose links are all shown


def render(reports: Mapping[int, Mapping[str, Any]], links: Links, problems: Sequence[Problem]) -> Group:
    """All of it."""
    worries = [Text.assemble(("! ", "bold red"), p.what, "\n  ", ("→ " + p.remedy, "cyan")) for p in problems]
    return Group(
        titled("Processes", processes(reports)),
        *(titled(title, grid) for title, grid in link_tables(links)),
        titled("Who stands out", *(worries or [Text("nobody", style="green")])),
    )


def processes(reports: Mapping[int, Mapping[str, Any]]) -> Table:
    """A row each: the slowest device's rate, what a collective and the disk take."""
    grid = Table(
        "process", "host", "devices", "GFLOP/s", "all-reduce", "memory", "disk", "sync", box=None, pad_edge=False
    )
    for number, report in sorted(reports.items()):
        collective = report["collective"]
        mark, style = MARKS[collective["outcome"]]
        grid.add_row(
            str(number),
            report["host"],
            str(len(report["devices"])),
            f"{min(report['products']) / 1e9:.0f}",
            Text.assemble((f"{mark} ", style), f"{1e3 * collective['seconds']:.1f} ms"),
            f"{size(report['memory'])}, {report['used']:.0%} used",
            f"{size(report['written'])}/s",
            f"{1e3 * report['sync']:.1f} ms",
        )
    return grid


def link_tables(links: Links) -> list[tuple[str, Table]]:
    """Delay and bandwidth from row to column, the darker the worse; nothing for one machine."""
    count = len(links.delay)
    if count < 2:
        return []
    if count > MOST:
        return [(f"Links of {count} machines: --json has them all", Table(box=None))]
    return [
        ("Delay, ms, from row to column", matrix(1e3 * links.delay, worst=np.nanmax)),
        ("Bandwidth, MB/s", matrix(links.bandwidth / 1e6, worst=np.nanmin)),
    ]


def matrix(values: np.ndarray, *, worst: Any) -> Table:
    """[from, to]; the worst cell stands out."""
    grid = Table("", *map(str, range(len(values))), box=None, pad_edge=False)
    worst_value = worst(values) if np.isfinite(values).any() else None
    for number, row in enumerate(values):
        cells = [Text("·" if np.isnan(v) else f"{v:.3g}", style="bold" if v == worst_value else "") for v in row]
        grid.add_row(str(number), *cells)
    return grid
