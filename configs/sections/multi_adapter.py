"""Several adapters on one base: what each of them has of its own."""

from pydantic import Field

from .base import Section
from .data import SourceConfig


class NamedAdapterConfig(Section):
    """One of several adapters: where it differs from the section adapter."""

    data: SourceConfig | None = None
    """Documents it learns, where they are others than in the section data: keys of that section."""
    rows: int | None = Field(None, ge=1)
    """Rows of every global batch that are its own; null, for all of them: equal shares."""
    rank: int | None = Field(None, ge=1)
    """Instead of `adapter.rank`."""
    alpha: float | None = Field(None, gt=0)
    """Instead of `adapter.alpha`."""
    targets: list[str] | None = Field(None, min_length=1)
    """Instead of `adapter.targets`."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak, instead of `optimizer.learning_rate`; the schedule is the same."""
