"""What each adapter method requires of the model and of the length of the run."""

from ..sections.adapter import PREFIX_METHODS, SPARSE_METHODS, AdapterConfig
from ..sections.model import KERNEL_PLATFORMS, ModelConfig


def check_oft_blocks(adapter: AdapterConfig, model: ModelConfig) -> None:
    """Raise ValueError where `adapter.block` of oft does not divide the inputs of a linear map."""
    for key, size in (("embed", model.embed), ("heads x head_dim", model.heads * model.head_width), ("mlp", model.mlp)):
        if adapter.method == "oft" and size % adapter.block:
            raise ValueError(
                f"adapter.block: {adapter.block} does not divide model.{key} ({size}); use a divisor of it"
            )


def check_budget(adapter: AdapterConfig, *, steps: int, average: float | None) -> None:
    """Raise ValueError where adalora cannot distribute its ranks in a run of `steps`."""
    budget = adapter.budget
    if adapter.method != "adalora":
        return
    if budget.rank > adapter.rank:
        raise ValueError(f"adapter.budget.rank: {budget.rank} exceeds adapter.rank ({adapter.rank}), where it starts")
    if budget.after + budget.settled >= steps:
        raise ValueError(
            f"adapter.budget: after {budget.after} and settled {budget.settled} leave none of {steps} steps to "
            "distribute ranks; lower one of them"
        )
    if average is not None:
        raise ValueError(f"optimizer.ema: {average} would average pruned ranks of adapter.method adalora; remove it")


def check_element_search(adapter: AdapterConfig, *, steps: int, average: float | None, spike: float | None) -> None:
    """Raise ValueError where the search for trained elements conflicts with the rest of the run."""
    if adapter.method not in SPARSE_METHODS:
        return
    if adapter.scouting >= steps:
        raise ValueError(f"adapter.scouting: {adapter.scouting} updates leave none of {steps} steps to train; lower it")
    if average is not None:
        raise ValueError(
            f"optimizer.ema: {average} would average the search of adapter.method {adapter.method}; remove it"
        )
    if spike is not None:
        raise ValueError(f"logging.spike: {spike} would compare norms of all elements and of few; set it to null")


def check_prefix(adapter: AdapterConfig, model: ModelConfig, *, tokens: int) -> None:
    """Raise ValueError where a prefix does not fit the model, or `adapter.tokens` exceed its vocabulary."""
    if adapter.method == "tokens" and max(adapter.tokens) >= model.vocab:
        raise ValueError(f"adapter.tokens: {max(adapter.tokens)} must be below model.vocab ({model.vocab})")
    if adapter.method not in PREFIX_METHODS:
        return
    if any(window is not None for window in model.windows):
        raise ValueError(
            f"adapter.method: {adapter.method} prepends tokens, which sliding windows (model.windows: "
            f"{list(model.windows)}) do not reach; use lora"
        )
    if model.attention in KERNEL_PLATFORMS:
        raise ValueError(f"model.attention: {model.attention} cannot compute adapter.method {adapter.method}; use auto")
    if model.position_encoding == "learned" and model.max_positions < adapter.length + tokens:
        raise ValueError(
            f"adapter.length: {adapter.length} and data.sequence_length ({tokens}) exceed model.max_positions "
            f"({model.max_positions}); lower one of them"
        )
