"""The base class of all sections of the configuration: frozen, typed, and without unknown keys."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings. The docstring of a field documents its key, in the schema and in errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), serialize_by_alias=True
    )


MemoryDecision = Literal["keep", "recompute", "offload"]
