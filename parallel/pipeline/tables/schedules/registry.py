"""Every schedule by its name in YAML, and `make_table`, which makes the table of one. NumPy only."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from .....configs.errors import UserError
from ..table import Table
from ..validate import check_table
from . import (
    auto,
    forward_only,
    from_file,
    gpipe,
    interlaced,
    interleaved,
    one_forward_one_backward,
    v_shaped,
    zero_bubble,
)
from .family import Family, Request

SCHEDULES: Mapping[str, Family] = {
    **gpipe.FAMILIES,
    **one_forward_one_backward.FAMILIES,
    **interleaved.FAMILIES,
    **zero_bubble.FAMILIES,
    **v_shaped.FAMILIES,
    **auto.FAMILIES,
    **interlaced.FAMILIES,
    **forward_only.FAMILIES,
    **from_file.FAMILIES,
}


def make_table(
    name: str,
    *,
    devices: int,
    microbatches: int,
    chunks: int | None = None,
    vocabulary: int = 0,
    memory_limit: float | None = None,
    placement: np.ndarray | None = None,
    path: Path | None = None,
) -> Table:
    """The checked table of a named schedule.

    `chunks`: stages on each device, by default the fewest that the schedule takes; `vocabulary`: 0, or the algorithm 1
    or 2 of the vocabulary passes; `memory_limit`: for `auto`, in microbatches of all chunks of a device; `placement`
    [devices, chunks]: for `forward-only`, that of the training table; `path`: for `file`, that of the CSV. Raises
    UserError for options that the schedule does not take.
    """
    if name not in SCHEDULES:
        raise UserError.no_match("pipeline.schedule", [name], candidates=SCHEDULES)
    family = SCHEDULES[name]
    if placement is not None:
        chunks = chunks or placement.shape[1]
    request = Request(devices, microbatches, chunks or family.chunks[0], vocabulary, memory_limit, placement, path)
    _check_request(name, family, request)
    table = family.make(request)
    if chunks is not None and table.chunks != chunks:  # those of a file are in the file
        raise UserError(f"pipeline.chunks: {chunks}, but {path} has {table.chunks}; change one of them")
    check_table(table)
    return table


def _check_request(name: str, family: Family, request: Request) -> None:
    if request.devices < 1:
        raise UserError(f"pipeline stages: {request.devices} devices; use at least 1")
    if request.microbatches < 1:
        raise UserError(f"microbatches: {request.microbatches}; use at least 1, and {request.devices} or more to keep "
                        f"{request.devices} devices busy")  # fmt: skip
    fewest, most = family.chunks
    if request.placement is None and (request.chunks < fewest or (most is not None and request.chunks > most)):
        allowed = f"exactly {fewest}" if fewest == most else f"{fewest} or more"
        raise UserError(f"pipeline.chunks: {request.chunks}, but pipeline.schedule: {name} takes {allowed}")
    if request.vocabulary not in family.vocabulary:
        working = [
            schedule
            for schedule, option in SCHEDULES.items()
            if request.vocabulary in option.vocabulary and option.trains and "path" not in option.options
        ]
        remedy = f"use {_alternatives(working)}" if working else "1f1b and v-half take 1 and 2"
        raise UserError(f"pipeline.vocab_parallel: {request.vocabulary}, but pipeline.schedule: {name} takes "
                        f"{_alternatives(family.vocabulary)}; {remedy}")  # fmt: skip
    for option in ("memory_limit", "placement", "path"):
        if (value := getattr(request, option)) is not None and option not in family.options:
            takers = [schedule for schedule, other in SCHEDULES.items() if option in other.options]
            raise UserError(f"{option}: {value}, but pipeline.schedule: {name} does not take it; leave it out, or use "
                            f"{_alternatives(takers)}")  # fmt: skip


def _alternatives(options: Iterable[object]) -> str:
    return " or ".join(map(str, options))
