"""The base class of all sections of the configuration: frozen, typed, and without unknown keys."""

from collections.abc import Collection, Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings. The docstring of a field documents its key, in the schema and in errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), serialize_by_alias=True
    )


MemoryDecision = Literal["keep", "recompute", "offload"]


def check_keys_are_read(section: Section, key: str, *, selector: str, readers: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError for a key that is set, but that the value of `selector` does not read.

    `key` is the section's own; `readers` maps each value of `selector` to the keys that it reads.
    """
    selected = getattr(section, selector)
    for name in sorted(set().union(*readers.values()) - set(readers[selected])):
        value, default = getattr(section, name), type(section).model_fields[name].default
        if value != default:
            others = " or ".join(other for other, names in readers.items() if name in names)
            raise ValueError(
                f"{key}.{name}: {value!r} has no effect on {key}.{selector} {selected}; remove it ({key}.{name}="
                f"{'null' if default is None else default} where another file sets it), or set {key}.{selector} to "
                f"{others}"
            )
