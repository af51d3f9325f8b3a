"""Whether several adapters can be trained together, and as they are described."""

import re

from ..adapter_runs import merged_data, resolve_adapters
from ..run_fields import RunFields
from ..sections.data import check_packing, check_source

UNSUPPORTED_RECIPES = (
    "reward",
    "lrec",
    "distill",
)  # recipes with weights of their own, or a model beside the one that is trained


def check_adapters(config: RunFields) -> None:
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
        "recipe.name": (
            config.recipe.name,
            config.recipe.name not in UNSUPPORTED_RECIPES,
            "sft or dpo, or train one a run",
        ),
    }
    for key, (value, fits, remedy) in refused.items():
        if not fits:
            raise ValueError(f"{key}: {value} beside several adapters ({names}); set it to {remedy}")
    check_rows(config)
    check_sources(config)
    ranks = {adapter.rank for adapter in resolve_adapters(config).values()}
    if config.optimizer.name == "adafactor" and len(ranks) > 1:
        raise ValueError(
            f"optimizer.name: adafactor takes means over whole matrices, and the narrower of ranks {sorted(ranks)} are "
            "filled up with zeros; use adamw, or give all adapters one rank"
        )
    if config.optimizer.learning_rate == 0 and any(one.learning_rate for one in config.adapters.values()):
        raise ValueError("optimizer.learning_rate: 0 beside a learning rate of an adapter; set it above 0")


def check_rows(config: RunFields) -> None:
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


def check_sources(config: RunFields) -> None:
    """Raise ValueError where what an adapter reads is no source."""
    for name, one in config.adapters.items():
        if one.data is not None:
            check_source(one.data, key=f"adapters.{name}.data")
    check_packing(merged_data(config))
