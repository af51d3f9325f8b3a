"""A schedule somebody else made, read from a CSV (`csvfile`). NumPy only."""

from .....configs.errors import UserError
from ..csv_io import read_csv
from ..table import Table
from .family import Family, Request


def from_file(request: Request) -> Table:
    """The table of `path`. Raises UserError where it is not one for these devices and microbatches."""
    if request.path is None:
        raise UserError("pipeline.path: None; the schedule file is read from a CSV, say which")
    table = read_csv(request.path)
    asked = {
        "devices": (table.devices, request.devices),
        "microbatches": (table.microbatches, request.microbatches),
        "algorithm of vocabulary passes": (table.algorithm, request.vocabulary),
    }
    for what, (there, wanted) in asked.items():
        if there != wanted:
            raise UserError(f"{request.path}: a schedule of {there} {what}, the run has {wanted}; change one of them")
    return table


FAMILIES = {
    "file": Family(from_file, "a table read from a CSV", chunks=(1, None), vocabulary=(0, 1, 2), options=("path",))
}
