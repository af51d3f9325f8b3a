"""What the self-test of many machines found, for a terminal: a row a process, the links, and what stands out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..launch.network_probe import Links
from ..report.markup import format_bytes
from .findings import Problem
from .machine_view import MARKS, problem_section, section

MOST_MACHINES = 16  # of which all links are printed


def render(reports: Mapping[int, Mapping[str, Any]], links: Links, problems: Sequence[Problem]) -> Group:
    """Everything that the self-test prints. `reports` by process, as `examine_machine` makes them."""
    return Group(
        section("Processes", process_table(reports)),
        *(section(title, grid) for title, grid in link_tables(links)),
        problem_section("Who stands out", problems, empty="nobody"),
    )


def process_table(reports: Mapping[int, Mapping[str, Any]]) -> Table:
    """A row a process: the rate of its slowest device, the time of a collective, its memory and disk."""
    grid = Table(
        "process", "host", "devices", "GFLOP/s", "all-reduce", "memory", "disk", "sync", box=None, pad_edge=False
    )
    for index, report in sorted(reports.items()):
        collective = report["collective"]
        mark, style = MARKS[collective["outcome"]]
        grid.add_row(
            str(index),
            report["host"],
            str(len(report["devices"])),
            f"{min(report['products']) / 1e9:.0f}",
            Text.assemble((f"{mark} ", style), f"{1e3 * collective['seconds']:.1f} ms"),
            f"{format_bytes(report['memory'])}, {report['used']:.0%} used",
            f"{format_bytes(report['written'])}/s",
            f"{1e3 * report['sync']:.1f} ms",
        )
    return grid


def link_tables(links: Links) -> list[tuple[str, Table]]:
    """(title, table) of delay and bandwidth, from row to column; none for one machine."""
    count = len(links.delay)
    if count < 2:
        return []
    if count > MOST_MACHINES:
        return [(f"Links of {count} machines: --json has them all", Table(box=None))]
    return [
        ("Delay, ms, from row to column", matrix_table(1e3 * links.delay, worst=np.nanmax)),
        ("Bandwidth, MB/s", matrix_table(links.bandwidth / 1e6, worst=np.nanmin)),
    ]


def matrix_table(values: np.ndarray, *, worst: Any) -> Table:
    """A matrix [from, to]; the worst cells are bold. `worst` is `np.nanmax` or `np.nanmin`."""
    grid = Table("", *map(str, range(len(values))), box=None, pad_edge=False)
    worst_value = worst(values) if np.isfinite(values).any() else None
    for index, row in enumerate(values):
        cells = [Text("·" if np.isnan(v) else f"{v:.3g}", style="bold" if v == worst_value else "") for v in row]
        grid.add_row(str(index), *cells)
    return grid
