"""What a method of the section adapter needs of the model and of the length of the run."""

from ..sections.adapter import PREFIX_METHODS, SPARSE_METHODS, AdapterConfig
from ..sections.model import ModelConfig


def check_oft_blocks(adapter: AdapterConfig, model: ModelConfig) -> None:
    """Raise ValueError where blocks of `oft` do not fit the maps' inputs."""
    for key, size in (("embed", model.embed), ("heads x head_dim", model.heads * model.head_width), ("mlp", model.mlp)):
        if adapter.method == "oft" and size % adapter.block:
            raise ValueError(
                f"adapter.block: {adapter.block} does not divide model.{key} ({size}); use a divisor of it"
            )


def check_budget(adapter: AdapterConfig, *, steps: int, average: float | None) -> None:
    """Raise ValueError where `adalora` cannot share ranks out in a run of `steps`."""
    budget = adapter.budget
    if adapter.method != "adalora":
        return
    if budget.rank > adapter.rank:
        raise ValueError(f"adapter.budget.rank: {budget.rank} exceeds adapter.rank ({adapter.rank}), where it starts")
    if budget.after + budget.settled >= steps:
        raise ValueError(
            f"adapter.budget: after {budget.after} and settled {budget.settled} leave none of {steps} steps to share "
            "ranks out; shorten one of them"
        )
    if average is not None:
        raise ValueError(f"optimizer.ema: {average} would average ranks that were taken away; remove it with adalora")


def check_element_search(adapter: AdapterConfig, *, steps: int, average: float | None, spike: float | None) -> None:
    """Raise ValueError where the search for elements leaves nothing of a run of `steps`."""
    if adapter.method not in SPARSE_METHODS:
        return
    if adapter.scouting >= steps:
        raise ValueError(f"adapter.scouting: {adapter.scouting} updates leave none of {steps} steps to train; lower it")
    if average is not None:
        raise ValueError(f"optimizer.ema: {average} would average over the search of {adapter.method}; remove it")
    if spike is not None:
        raise ValueError(f"logging.spike: {spike} compares the norm of all elements with that of few; set it to null")


def check_prefix(adapter: AdapterConfig, model: ModelConfig, *, tokens: int) -> None:
    """Raise ValueError where `adapter` cannot stand in front of documents, or names tokens that the model lacks."""
    if adapter.method == "tokens" and max(adapter.tokens) >= model.vocab:
        raise ValueError(f"adapter.tokens: {max(adapter.tokens)} is no token, model.vocab is {model.vocab}")
    if adapter.method not in PREFIX_METHODS:
        return
    if any(window is not None for window in model.windows):
        raise ValueError(
            f"adapter.method: {adapter.method} stands in front of documents, where windows (model.windows: "
            f"{list(model.windows)}) do not reach; use lora"
        )
    if model.attention == "cudnn":
        raise ValueError(f"model.attention: cudnn cannot show all documents the keys of {adapter.method}; use auto")
    if model.position_encoding == "learned" and model.max_positions < adapter.length + tokens:
        raise ValueError(
            f"adapter.length: {adapter.length} and data.sequence_length ({tokens}) exceed model.max_positions "
            f"({model.max_positions}); shorten one of them"
        )
