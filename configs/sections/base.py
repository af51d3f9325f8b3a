"""What every section of the configuration is: frozen, typed, and closed to keys it does not know."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings. Each field's docstring is its documentation, in the schema and in errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), serialize_by_alias=True
    )


MemoryDecision = Literal["keep", "recompute", "offload"]
