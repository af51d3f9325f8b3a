"""Several adapters on one base, trained in one step: what each has of its own, and the run that each is by itself.

    alone(config, "code")       the run of that adapter alone: its rows, its source, its rank, its learning rate

Training them together makes the updates that these runs would make.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from .adapter import AdapterConfig
from .base import Section
from .data import DataConfig, MixtureSource, SourceConfig, check_packing, check_source

if TYPE_CHECKING:
    from .run import RunConfig

WITHOUT = ("reward", "lrec", "distill")  # recipes with weights of their own, or a model beside the one that is trained


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


def rows_of(config: "RunConfig") -> dict[str, int]:
    """Rows of a global batch of each adapter, in the order they stand there; {} where there are not several."""
    share = config.data.global_batch // max(len(config.adapters), 1)
    return {name: share if one.rows is None else one.rows for name, one in config.adapters.items()}


def adapter_of(config: "RunConfig", name: str) -> AdapterConfig:
    """The settings of one of several adapters."""
    own = {key: getattr(config.adapters[name], key) for key in ("rank", "alpha", "targets")}
    return config.adapter.model_copy(update={key: value for key, value in own.items() if value is not None})


def adapters_of(config: "RunConfig") -> dict[str, AdapterConfig]:
    """The settings of each of several adapters."""
    return {name: adapter_of(config, name) for name in config.adapters}


def widest(adapters: Mapping[str, AdapterConfig]) -> AdapterConfig:
    """One adapter that has room for each of `adapters`: wherever one of them is, and as wide as the widest there."""
    first, *more = adapters.values()
    targets = first.targets
    for one in more:
        targets = None if targets is None or one.targets is None else list(dict.fromkeys([*targets, *one.targets]))
    return first.model_copy(update={"rank": max(one.rank for one in adapters.values()), "targets": targets})


def inherited(values: Mapping[str, Any]) -> dict[str, Any]:
    """A run's tree of settings in which each of several adapters has all settings of its source, and data none.

    What is not of the right type is left to be refused where it is.
    """
    adapters, data = values.get("adapters"), values.get("data", {})
    if not adapters or not isinstance(adapters, Mapping) or not isinstance(data, Mapping):
        return dict(values)
    common = {key: value for key, value in data.items() if key in SourceConfig.model_fields}

    def whole(one: Any) -> Any:
        own = one.get("data") or {} if isinstance(one, Mapping) else None
        return one | {"data": common | own} if isinstance(own, Mapping) else one

    return values | {
        "adapters": {name: whole({} if one is None else one) for name, one in adapters.items()},
        "data": {key: value for key, value in data.items() if key not in common},
    }


def source_of(config: "RunConfig", name: str) -> SourceConfig:
    """What one of several adapters reads."""
    return config.adapters[name].data or config.data


def alone(config: "RunConfig", name: str) -> "RunConfig":
    """The run of one of several adapters by itself; its layers are stacked as they are in the run of all."""
    source = {key: getattr(source_of(config, name), key) for key in SourceConfig.model_fields}
    peak = config.adapters[name].learning_rate
    return config.model_copy(
        update={
            "name": f"{config.name}-{name}",
            "adapter": adapter_of(config, name),
            "adapters": {},
            "data": config.data.model_copy(update=source | {"global_batch": rows_of(config)[name]}),
            "optimizer": config.optimizer.model_copy(update={} if peak is None else {"learning_rate": peak}),
        }
    )


def together(config: "RunConfig") -> DataConfig:
    """The section data with the sources of all adapters, each weighted by its rows."""
    rows, fields = rows_of(config), SourceConfig.model_fields
    mixture = tuple(
        MixtureSource(**{key: getattr(source_of(config, name), key) for key in fields}, weight=rows[name])
        for name in config.adapters
    )
    defaults = {key: field.default for key, field in fields.items()}
    return config.data.model_copy(update=defaults | {"mixture": mixture})


def check_adapters(config: "RunConfig") -> None:
    """Raise ValueError where several adapters cannot be trained together, or not as they are described."""
    if not config.adapters:
        if config.adapter is not None and config.adapter.product != "gathered":
            raise ValueError(f"adapter.product: {config.adapter.product} is for several adapters; remove it")
        return
    names = ", ".join(config.adapters)
    for name in config.adapters:
        if not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(f"adapters: {name!r} must be letters, digits, '_' or '-': it becomes a directory's name")
    if config.adapter is None:
        raise ValueError(
            f"adapter: null beside adapters ({names}); it says what they have in common, e.g. adapter.method=lora"
        )
    refused = {
        "adapter.method": (config.adapter.method, config.adapter.method == "lora", "lora"),
        "adapter.start": (config.adapter.start, config.adapter.start == "zero", "zero: others change the base"),
        "islands": ("set", config.islands is None, "null"),
        "privacy": ("set", config.privacy is None, "null, or train one adapter a run"),
        "elastic.deterministic": (True, not config.elastic.deterministic, "false"),
        "data.mixture": (len(config.data.mixture), not config.data.mixture, "[]: each adapter reads one source"),
        "recipe.name": (config.recipe.name, config.recipe.name not in WITHOUT, "sft or dpo, or train one a run"),
    }
    for key, (value, fits, remedy) in refused.items():
        if not fits:
            raise ValueError(f"{key}: {value} beside several adapters ({names}); set it to {remedy}")
    check_rows(config)
    check_sources(config)
    ranks = {adapter.rank for adapter in adapters_of(config).values()}
    if config.optimizer.name == "adafactor" and len(ranks) > 1:
        raise ValueError(
            f"optimizer.name: adafactor takes means over whole matrices, and the narrower of ranks {sorted(ranks)} are "
            "filled up with zeros; use adamw, or give all adapters one rank"
        )
    if config.optimizer.learning_rate == 0 and any(one.learning_rate for one in config.adapters.values()):
        raise ValueError("optimizer.learning_rate: 0 beside a learning rate of an adapter; set it above 0")


def check_rows(config: "RunConfig") -> None:
    """Raise ValueError where the rows of all adapters do not make up the batch."""
    given, batch = [one.rows for one in config.adapters.values()], config.data.global_batch
    if None in given and any(rows is not None for rows in given):
        missing = next(name for name, one in config.adapters.items() if one.rows is None)
        raise ValueError(f"adapters.{missing}.rows: not set, and others are; set all of them, or none")
    if None in given and batch % len(given):
        raise ValueError(
            f"data.global_batch: {batch} rows are not divisible by {len(given)} adapters; change it, or set all their "
            "rows"
        )
    if None not in given and sum(given) != batch:
        raise ValueError(
            f"data.global_batch: {batch}, but adapters have {' + '.join(map(str, given))} = {sum(given)} rows; set it "
            f"to {sum(given)}"
        )


def check_sources(config: "RunConfig") -> None:
    """Raise ValueError where what an adapter reads is no source."""
    for name, one in config.adapters.items():
        if one.data is not None:
            check_source(one.data, key=f"adapters.{name}.data")
    check_packing(together(config))
