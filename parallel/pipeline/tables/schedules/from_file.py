"""A schedule that is read from a CSV file (`csv_io.py`). NumPy only."""

from .....configs.errors import UserError
from ..csv_io import read_csv
from ..table import Table
from .family import Family, Request


def from_file(request: Request) -> Table:
    """The table in the file `path`. Raises UserError if it is for other devices or microbatches."""
    if request.path is None:
        raise UserError("pipeline.path: None, but pipeline.schedule: file reads a CSV; set its path")
    table = read_csv(request.path)
    sizes = {
        "devices": (table.devices, request.devices),
        "microbatches": (table.microbatches, request.microbatches),
        "vocabulary algorithm": (table.algorithm, request.vocabulary),
    }
    for name, (in_file, requested) in sizes.items():
        if in_file != requested:
            raise UserError(f"{request.path}: {name}: {in_file}, but the run has {requested}; change one of them")
    return table


FAMILIES = {
    "file": Family(from_file, "a table read from a CSV", chunks=(1, None), vocabulary=(0, 1, 2), options=("path",))
}
