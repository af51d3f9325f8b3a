"""Every schedule by the name used in YAML, and `make`, which asks one for a table. NumPy only."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from .....configs.errors import UserError
from ..table import Table
from ..validate import check
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


def make(
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
    """The table of a named schedule, validated.

    `chunks` stages a device (default: the fewest the schedule takes); `vocabulary` 0, or the algorithm 1 or 2 of the
    vocabulary passes; `memory_limit` in microbatches of a whole device, for `auto`; `placement` [devices, chunks] for
    `forward-only`, which follows the training table's; `path` of the CSV for `file`. Raises UserError for what the
    schedule does not take.
    """
    if name not in SCHEDULES:
        raise UserError.no_match("pipeline.schedule", [name], known=SCHEDULES)
    family = SCHEDULES[name]
    if placement is not None:
        chunks = chunks or placement.shape[1]
    request = Request(devices, microbatches, chunks or family.chunks[0], vocabulary, memory_limit, placement, path)
    _check_request(name, family, request)
    table = family.make(request)
    if chunks is not None and table.chunks != chunks:  # a file knows its own
        raise UserError(f"pipeline.chunks: {chunks}, and {path} has {table.chunks}; change one of them")
    check(table)
    return table


def _check_request(name: str, family: Family, request: Request) -> None:
    if request.devices < 1:
        raise UserError(f"pipeline stages: {request.devices} devices; a pipeline has at least 1")
    if request.microbatches < 1:
        raise UserError(f"microbatches: {request.microbatches}; a pipeline is fed at least 1, and {request.devices} "
                        f"or more keep {request.devices} devices busy")  # fmt: skip
    fewest, most = family.chunks
    if request.placement is None and (request.chunks < fewest or (most is not None and request.chunks > most)):
        taken = f"exactly {fewest}" if fewest == most else f"{fewest} or more"
        raise UserError(f"pipeline.chunks: {name} takes {taken}, not {request.chunks}")
    if request.vocabulary not in family.vocabulary:
        taken = _listed(family.vocabulary)
        working = [
            other
            for other, one in SCHEDULES.items()
            if request.vocabulary in one.vocabulary and one.trains and "path" not in one.options
        ]
        remedy = f"{_listed(working)} would work" if working else "1f1b and v-half take 1 and 2"
        raise UserError(f"pipeline.vocab_parallel: {name} takes {taken}, not {request.vocabulary}; {remedy}")
    for option in ("memory_limit", "placement", "path"):
        if getattr(request, option) is not None and option not in family.options:
            takers = [other for other, one in SCHEDULES.items() if option in one.options]
            raise UserError(f"{option}: {name} takes none; {_listed(takers)} would")


def _listed(words: object) -> str:
    return " or ".join(str(word) for word in words)
