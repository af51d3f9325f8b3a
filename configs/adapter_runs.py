"""Several adapters on one base, trained in one step: what each has of its own, and the run that each is by itself.

    alone(config, "code")       the run of that adapter alone: its rows, its source, its rank, its learning rate

Training them together makes the updates that these runs would make.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from .run_fields import RunFields
from .sections.adapter import AdapterConfig
from .sections.data import DataConfig, MixtureSource, SourceConfig

Run = TypeVar("Run", bound=RunFields)


def adapter_rows(config: RunFields) -> dict[str, int]:
    """Rows of a global batch of each adapter, in the order they stand there; {} where there are not several."""
    share = config.data.global_batch // max(len(config.adapters), 1)
    return {name: share if one.rows is None else one.rows for name, one in config.adapters.items()}


def resolve_adapter(config: RunFields, name: str) -> AdapterConfig:
    """The settings of one of several adapters."""
    own = {key: getattr(config.adapters[name], key) for key in ("rank", "alpha", "targets")}
    return config.adapter.model_copy(update={key: value for key, value in own.items() if value is not None})


def resolve_adapters(config: RunFields) -> dict[str, AdapterConfig]:
    """The settings of each of several adapters."""
    return {name: resolve_adapter(config, name) for name in config.adapters}


def widest_adapter(adapters: Mapping[str, AdapterConfig]) -> AdapterConfig:
    """One adapter that has room for each of `adapters`: wherever one of them is, and as wide as the widest there."""
    first, *more = adapters.values()
    targets = first.targets
    for one in more:
        targets = None if targets is None or one.targets is None else list(dict.fromkeys([*targets, *one.targets]))
    return first.model_copy(update={"rank": max(one.rank for one in adapters.values()), "targets": targets})


def inherit_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's tree of settings in which each of several adapters has all settings of its source, and data none.

    What is not of the right type is left to be refused where it is.
    """
    adapters, data = values.get("adapters"), values.get("data", {})
    if not adapters or not isinstance(adapters, Mapping) or not isinstance(data, Mapping):
        return dict(values)
    shared = {key: value for key, value in data.items() if key in SourceConfig.model_fields}

    def whole(one: Any) -> Any:
        own = one.get("data") or {} if isinstance(one, Mapping) else None
        return one | {"data": shared | own} if isinstance(own, Mapping) else one

    return values | {
        "adapters": {name: whole({} if one is None else one) for name, one in adapters.items()},
        "data": {key: value for key, value in data.items() if key not in shared},
    }


def adapter_source(config: RunFields, name: str) -> SourceConfig:
    """What one of several adapters reads."""
    return config.adapters[name].data or config.data


def single_adapter_run(config: Run, name: str) -> Run:
    """The run of one of several adapters by itself; its layers are stacked as they are in the run of all."""
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
