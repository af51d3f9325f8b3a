"""The section adapters: the settings of each of several adapters on one base model."""

from pydantic import Field

from .base import Section
from .data import SourceConfig


class NamedAdapterConfig(Section):
    """One of several adapters: its differences from the section adapter."""

    data: SourceConfig | None = None
    """Its documents, with the keys of a source in the section data; null: those of the section data."""
    rows: int | None = Field(None, ge=1)
    """Its rows in every global batch; null (for all adapters or none): equal shares."""
    rank: int | None = Field(None, ge=1)
    """In place of `adapter.rank`; null: the same."""
    alpha: float | None = Field(None, gt=0)
    """In place of `adapter.alpha`; null: the same."""
    targets: list[str] | None = Field(None, min_length=1)
    """In place of `adapter.targets`; null: the same."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate in place of `optimizer.learning_rate`, with the same schedule; null: the same."""
