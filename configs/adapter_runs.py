"""Several adapters that are trained together on one base model: the settings of each, and the run of each alone.

    single_adapter_run(config, "code")       the run of that adapter: its rows, source, rank and learning rate

Training the adapters together gives the same updates as these runs.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from .run_fields import RunFields
from .sections.adapter import AdapterConfig
from .sections.data import DataConfig, MixtureSource, SourceConfig

Run = TypeVar("Run", bound=RunFields)


def adapter_rows(config: RunFields) -> dict[str, int]:
    """Adapter -> its rows in a global batch, in their order there; {} in a run without several adapters."""
    share = config.data.global_batch // max(len(config.adapters), 1)
    return {name: share if adapter.rows is None else adapter.rows for name, adapter in config.adapters.items()}


def resolve_adapter(config: RunFields, name: str) -> AdapterConfig:
    """The section adapter of one of several adapters."""
    changes = {key: getattr(config.adapters[name], key) for key in ("rank", "alpha", "targets")}
    return config.adapter.model_copy(update={key: value for key, value in changes.items() if value is not None})


def resolve_adapters(config: RunFields) -> dict[str, AdapterConfig]:
    """Name -> the section adapter of each of several adapters."""
    return {name: resolve_adapter(config, name) for name in config.adapters}


def widest_adapter(adapters: Mapping[str, AdapterConfig]) -> AdapterConfig:
    """An adapter that can hold each of `adapters`: with all their targets and the largest of their ranks."""
    first, *more = adapters.values()
    targets = first.targets
    for other in more:
        targets = None if None in (targets, other.targets) else list(dict.fromkeys([*targets, *other.targets]))
    return first.model_copy(update={"rank": max(adapter.rank for adapter in adapters.values()), "targets": targets})


def inherit_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """Move the settings of a source from `data` to each of several adapters, whose own settings win.

    Values of a wrong type are left in place, for pydantic to refuse.
    """
    adapters, data = values.get("adapters"), values.get("data", {})
    if not adapters or not isinstance(adapters, Mapping) or not isinstance(data, Mapping):
        return dict(values)
    shared = {key: value for key, value in data.items() if key in SourceConfig.model_fields}

    def with_shared(adapter: Any) -> Any:
        source = adapter.get("data") or {} if isinstance(adapter, Mapping) else None
        return adapter | {"data": shared | source} if isinstance(source, Mapping) else adapter

    return values | {
        "adapters": {name: with_shared({} if adapter is None else adapter) for name, adapter in adapters.items()},
        "data": {key: value for key, value in data.items() if key not in shared},
    }


def adapter_source(config: RunFields, name: str) -> SourceConfig:
    """The source of documents of one of several adapters."""
    return config.adapters[name].data or config.data


def single_adapter_run(config: Run, name: str) -> Run:
    """The run that trains one of several adapters alone, with layers stacked as in the run of all."""
    source = {key: getattr(adapter_source(config, name), key) for key in SourceConfig.model_fields}
    peak = config.adapters[name].learning_rate
    return config.model_copy(
        update={
            "name": f"{config.name}-{name}",
            "adapter": resolve_adapter(config, name),
            "adapters": {},
            "data": config.data.model_copy(update=source | {"global_batch": adapter_rows(config)[name]}),
            "optimizer": config.optimizer.model_copy(update={} if peak is None else {"learning_rate": peak}),
        }
    )


def merged_data(config: RunFields) -> DataConfig:
    """The section data with the sources of all adapters, each weighted by its rows."""
    rows, fields = adapter_rows(config), SourceConfig.model_fields
    mixture = tuple(
        MixtureSource(**{key: getattr(adapter_source(config, name), key) for key in fields}, weight=rows[name])
        for name in config.adapters
    )
    defaults = {key: field.default for key, field in fields.items()}
    return config.data.model_copy(update=defaults | {"mixture": mixture})
