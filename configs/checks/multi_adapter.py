"""Whether several adapters can be trained together."""

import re

from ..adapter_runs import merged_data, resolve_adapters
from ..run_fields import RunFields
from ..sections.data import check_packing, check_source

UNSUPPORTED_RECIPES = (
    "reward",
    "lrec",
    "distill",
)  # recipes with their own weights, or a second model


def check_adapters(config: RunFields) -> None:
    """Raise ValueError where several adapters cannot be trained together as configured."""
    if not config.adapters:
        if config.adapter is not None and config.adapter.product != "gathered":
            raise ValueError(f"adapter.product: {config.adapter.product} is for several adapters; remove it")
        return
    names = ", ".join(config.adapters)
    for name in config.adapters:
        if not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(f"adapters: {name!r} must be letters, digits, '_' or '-', as the name of a directory")
    if config.adapter is None:
        raise ValueError(
            f"adapter: null with adapters ({names}); set what they have in common, e.g. adapter.method=lora"
        )
    refused = {
        "adapter.method": (config.adapter.method, config.adapter.method == "lora", "lora"),
        "adapter.start": (config.adapter.start, config.adapter.start == "zero", "zero; others change the base model"),
        "islands": ("set", config.islands is None, "null"),
        "privacy": ("set", config.privacy is None, "null, or train one adapter per run"),
        "elastic.deterministic": (True, not config.elastic.deterministic, "false"),
        "data.mixture": (len(config.data.mixture), not config.data.mixture, "[], and one source for each adapter"),
        "recipe.name": (
            config.recipe.name,
            config.recipe.name not in UNSUPPORTED_RECIPES,
            "sft or dpo, or train one adapter per run",
        ),
    }
    for key, (value, fits, remedy) in refused.items():
        if not fits:
            raise ValueError(f"{key}: {value} with several adapters ({names}); set it to {remedy}")
    check_rows(config)
    check_sources(config)
    ranks = {adapter.rank for adapter in resolve_adapters(config).values()}
    if config.optimizer.name == "adafactor" and len(ranks) > 1:
        raise ValueError(
            f"optimizer.name: adafactor takes means over whole matrices, but those with lower ranks of {sorted(ranks)} "
            "are padded with zeros; use adamw, or give all adapters one rank"
        )
    if config.optimizer.learning_rate == 0 and any(adapter.learning_rate for adapter in config.adapters.values()):
        raise ValueError("optimizer.learning_rate: 0 with adapters that have a learning_rate; set it above 0")


def check_rows(config: RunFields) -> None:
    """Raise ValueError where the rows of all adapters do not add up to the global batch."""
    rows, batch = [adapter.rows for adapter in config.adapters.values()], config.data.global_batch
    if None in rows and set(rows) != {None}:
        missing = next(name for name, adapter in config.adapters.items() if adapter.rows is None)
        raise ValueError(f"adapters.{missing}.rows: null, but others are set; set all of them, or none")
    if None in rows and batch % len(rows):
        raise ValueError(
            f"data.global_batch: {batch} rows are not divisible by {len(rows)} adapters; change it, or set all "
            "adapters.NAME.rows"
        )
    if None not in rows and sum(rows) != batch:
        raise ValueError(
            f"data.global_batch: {batch}, but adapters have {' + '.join(map(str, rows))} = {sum(rows)} rows; set it "
            f"to {sum(rows)}"
        )


def check_sources(config: RunFields) -> None:
    """Raise ValueError where the source of an adapter is not valid."""
    for name, adapter in config.adapters.items():
        if adapter.data is not None:
            check_source(adapter.data, key=f"adapters.{name}.data")
    check_packing(merged_data(config))
