"""Is a table a schedule at all? Every pass once, in order, in a place of its own. NumPy only."""

from .table import Table


def check(table: Table) -> None:
    """Raises UserError where the table is none."""
