"""Schedules in CSV files: written by `meshwright schedule --csv`, by hand, or by another program. NumPy only.

    # placement: 0 3 | 1 2
    # algorithm: 0
    # name: mine
    tick,device,op,microbatch,chunk
    0,0,F,0,0
    1,1,F,0,0

Comment lines come first. `placement` lists each device's stages, devices separated by `|`; without it stage i is on
device i. `algorithm` (default 0) is that of the vocabulary passes, whose chunk is -1; `name` defaults to the name of
the file. One line is one pass; lines may be in any order. Without the column `tick` a device does its lines from top to
bottom, each pass as early as it can. Slots are not written: interval coloring finds the same ones again.
"""

import csv
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ....configs.errors import UserError
from .dependencies import Pass, table_passes
from .list_schedule import assign_slots, tabulate
from .placement import straight
from .table import Op, Table
from .validate import check_table

COLUMNS = ("tick", "device", "op", "microbatch", "chunk")
HEADERS = ("placement", "algorithm", "name")


class Row(NamedTuple):
    """One line of the file."""

    line: int
    tick: int | None
    device: int
    step: Pass


def write_csv(table: Table, path: Path) -> None:
    """Write a table; `read_csv` returns the same one."""
    with path.open("w", newline="") as file:
        file.write(f"# placement: {' | '.join(' '.join(map(str, stages)) for stages in table.placement.tolist())}\n")
        file.write(f"# algorithm: {table.algorithm}\n# name: {table.name}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for tick, device, (op, microbatch, chunk) in table_passes(table):
            writer.writerow([tick, device, op.name, microbatch, chunk])


def read_csv(path: Path) -> Table:
    """The checked table in a file. Raises UserError naming file and line, or what is wrong with the schedule."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}; give the path of a CSV file") from error
    comments = sum(1 for _ in itertools.takewhile(lambda line: line.startswith("#"), lines))
    headers = _headers(path, lines[:comments])
    rows = list(_rows(path, lines, comments))
    if not rows:
        raise UserError(f"{path}: no passes; write one line for each pass, with columns {','.join(COLUMNS)}")
    devices = max(row.device for row in rows) + 1
    placement = _placement(path, headers["placement"]) if "placement" in headers else straight(devices)
    for row in rows:
        if row.device >= len(placement):
            raise UserError(f"{path}, line {row.line}: device {row.device}; the placement has {len(placement)} devices")
        if row.step.chunk >= placement.shape[1]:
            raise UserError(
                f"{path}, line {row.line}: chunk {row.step.chunk}; a device has {placement.shape[1]} chunks"
            )
    algorithm = _integer(headers.get("algorithm", "0"), f"{path}: algorithm")
    table = _table(path, rows, placement, algorithm=algorithm, name=headers.get("name", path.stem))
    check_table(table)
    return table


def _headers(path: Path, lines: list[str]) -> dict[str, str]:
    headers = {}
    for number, line in enumerate(lines, 1):
        key, colon, value = line.removeprefix("#").partition(":")
        if not colon:
            continue  # a comment
        if key.strip() not in HEADERS:
            raise UserError.no_match(f"{path}, line {number}", [key.strip()], candidates=HEADERS)
        headers[key.strip()] = value.strip()
    return headers


def _placement(path: Path, text: str) -> np.ndarray:
    devices = [[_integer(stage, f"{path}: placement") for stage in column.split()] for column in text.split("|")]
    stages = sorted(itertools.chain(*devices))
    if len({len(chunks) for chunks in devices}) != 1 or stages != list(range(len(stages))):
        raise UserError(f"{path}: placement {text!r}; give every device the same number of stages, and each stage from "
                        f"0 on once, e.g. 0 3 | 1 2")  # fmt: skip
    return np.array(devices)


def _rows(path: Path, lines: list[str], comments: int) -> Iterator[Row]:
    reader = csv.DictReader(lines[comments:])
    columns = [column.strip() for column in reader.fieldnames or ()]
    reader.fieldnames = columns
    if missing := set(COLUMNS[1:]) - set(columns):
        raise UserError(f"{path}, line {comments + 1}: column {', '.join(sorted(missing))} is missing; "
                        f"the columns are {','.join(COLUMNS)}")  # fmt: skip
    if unknown := set(columns) - set(COLUMNS):
        raise UserError.no_match(f"{path}, line {comments + 1}", unknown, candidates=COLUMNS)
    for cells in reader:
        line = comments + reader.line_num
        yield _row(f"{path}, line {line}", line, cells)


def _row(origin: str, line: int, cells: Mapping[str | None, str | None]) -> Row:
    if None in cells or None in cells.values():
        raise UserError(f"{origin}: {len([cell for cell in cells.values() if cell])} cells; give one for each column")
    name = cells["op"].strip()
    if name not in Op.__members__ or name == "IDLE":
        raise UserError.no_match(f"{origin}: op", [name], candidates=[op.name for op in Op if op])
    numbers = {key: _integer(cells[key], f"{origin}: {key}") for key in COLUMNS if key != "op" and key in cells}
    for key, number in numbers.items():
        if number < 0 and not (key == "chunk" and name in "ST"):
            raise UserError(f"{origin}: {key} {number}; count from 0")
    step = Pass(Op[name], numbers["microbatch"], -1 if name in "ST" else numbers["chunk"])
    return Row(line, numbers.get("tick"), numbers["device"], step)


def _integer(text: str, origin: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{origin} {text.strip()!r}; give a whole number") from None


def _table(path: Path, rows: list[Row], placement: np.ndarray, *, algorithm: int, name: str) -> Table:
    if rows[0].tick is None:
        orders = [[row.step for row in rows if row.device == device] for device in range(len(placement))]
        return tabulate(orders, placement, algorithm=algorithm, name=name)
    ticks = max(row.tick for row in rows) + 1
    op, microbatch, chunk = (np.full((ticks, len(placement)), fill, np.int32) for fill in (0, -1, -1))
    lines = {}  # (tick, device) -> line of the file
    for row in rows:
        cell = row.tick, row.device
        if cell in lines:
            raise UserError(f"{path}, line {row.line}: tick {row.tick}, device {row.device} is already in line "
                            f"{lines[cell]}; a device does one pass a tick")  # fmt: skip
        lines[cell] = row.line
        op[cell], microbatch[cell], chunk[cell] = row.step
    slot = assign_slots(op, microbatch, chunk)
    return Table(op, microbatch, chunk, slot, placement, int(microbatch.max()) + 1, algorithm, name)
