"""The section adapter: which weights are trained in place of the whole model."""

from typing import Literal

from pydantic import Field, model_validator

from .base import Section, check_keys_are_read

# Method -> the keys it reads beside `method`.
TARGET_KEYS = {"targets", "layers"}  # of methods that may adapt a part of the model
LORA_KEYS = TARGET_KEYS | {
    "rank",
    "alpha",
    "rank_stabilized",
    "ranks",
    "alphas",
    "start",
    "ratio",
    "freeze_a",
    "dropout",
}
METHOD_KEYS: dict[str, set[str]] = {
    "lora": LORA_KEYS | {"product"},
    "dora": LORA_KEYS,
    "adalora": TARGET_KEYS | {"rank", "alpha", "budget", "dropout"},
    "vera": TARGET_KEYS | {"rank", "dropout"},
    "ia3": TARGET_KEYS,
    "oft": TARGET_KEYS | {"block"},
    "shira": TARGET_KEYS | {"rank"},
    "prefix": {"length"},
    "prompt": {"length"},
    "p-tuning": {"length"},
    "tokens": {"tokens"},
    "serial": TARGET_KEYS | {"rank", "alpha"},
    "parallel": TARGET_KEYS | {"rank", "alpha"},
    "mam": {"length", "rank", "alpha"},
    "unipelt": {"length", "rank", "ranks"},
    "bitfit": TARGET_KEYS,
    "norms": TARGET_KEYS,
    "selective": TARGET_KEYS,
    "fishmask": TARGET_KEYS | {"density", "scouting"},
    "lottery": TARGET_KEYS | {"density", "scouting"},
}
SPARSE_METHODS = ("fishmask", "lottery")  # train single elements of weights
PER_EXAMPLE_METHODS = ("fishmask",)  # need the gradient of each example
PREFIX_METHODS = ("prefix", "prompt", "p-tuning", "mam", "unipelt")  # prepend keys to every document
NEEDS_ALL_LAYERS = ("prompt", "p-tuning")  # need all layers on one device


class BudgetConfig(Section):
    """How training distributes ranks over the linear maps (adalora)."""

    rank: int = Field(8, ge=1)
    """Mean rank of the maps at the end; they start with adapter.rank."""
    after: int = Field(0, ge=0)
    """Updates before the first rank is pruned."""
    every: int = Field(1, ge=1)
    """Updates between two decisions."""
    settled: int = Field(0, ge=0)
    """Updates at the end of the run during which ranks are fixed."""
    orthogonality: float = Field(0.5, ge=0)
    """Weight of the penalty that keeps the factors orthogonal."""


class AdapterConfig(Section):
    """Train a few added or selected weights and freeze the rest of the model."""

    method: Literal[tuple(METHOD_KEYS)] = "lora"  # type: ignore[valid-type]
    """lora (arXiv:2106.09685), dora (2402.09353), adalora (2303.10512), vera (2310.11454), ia3 (2205.05638), oft
    (2306.07280), shira (2406.13175) adapt linear maps. prefix (2101.00190), prompt (2104.08691), p-tuning (2103.10385)
    prepend virtual tokens to documents. tokens trains rows of the embedding. serial (1902.00751) and parallel
    (2110.04366) add perceptrons after or beside attention and MLP; mam (2110.04366) is prefix and parallel; unipelt
    (2110.07577) is lora of q and v, prefix, and serial of the MLP, each behind a gate. bitfit (2106.10199) trains
    biases, norms trains norms, selective trains what `targets` matches, and fishmask (2111.09839) and lottery (LT-SFT,
    2110.07560) train single elements of it."""
    targets: list[str] | None = None
    """Patterns of module names: q matches every layer, layers/7/attn/* one layer; for selective, patterns of weights.
    null: every linear map of the blocks (ia3: k, v, down; serial: attn, mlp; parallel: mlp; bitfit, norms: every bias,
    every norm; selective: every weight)."""
    layers: int | None = Field(None, ge=1)
    """How many of the last blocks are trained; no backward pass runs below them. null: all."""
    rank: int = Field(16, ge=1)
    """Width of added maps (lora, dora, adalora, vera, unipelt) and perceptrons (serial, parallel, mam, unipelt). shira
    trains as many entries as lora of this rank has."""
    block: int = Field(32, ge=2)
    """How many inputs of a map are rotated together (oft); a divisor of the inputs."""
    budget: BudgetConfig = BudgetConfig()
    """How ranks are distributed over the maps (adalora)."""
    length: int = Field(20, ge=1)
    """Virtual tokens before every document (prefix, prompt, p-tuning, mam, unipelt)."""
    tokens: list[int] = []
    """Ids of the tokens whose rows of the embedding are trained (tokens)."""
    density: float = Field(0.005, gt=0, lt=1)
    """Fraction of the elements of matched weights that is trained (fishmask, lottery)."""
    scouting: int = Field(16, ge=1)
    """Updates at the start that select these elements. fishmask sums the squared gradients of examples and changes no
    weight; lottery trains all elements and then restores their first values."""
    alpha: float | None = Field(None, gt=0)
    """The added map or perceptron is multiplied by alpha / rank; null: alpha = rank."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""
    ranks: dict[str, int] = {}
    """Pattern -> rank of matching modules; the first match wins, others have `rank`. unipelt: modules q, v, mlp."""
    alphas: dict[str, float] = {}
    """Pattern -> alpha of matching modules; the first match wins, others have `alpha`."""
    start: Literal["zero", "pissa", "olora", "loftq"] = "zero"
    """The added map starts at: zero; pissa (arXiv:2404.02948), olora (2406.01775): the principal part of the weight,
    which is subtracted from it; loftq (2310.08659): the error of quantization."""
    ratio: float = Field(1.0, gt=0)
    """Learning rate of the second factor over that of the first (LoRA+, arXiv:2402.12354, recommends 16)."""
    freeze_a: bool = False
    """Freeze the first factor and train only the second (LoRA-FA, arXiv:2308.03303)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an element of the added map's input, in training."""
    product: Literal["gathered", "ragged"] = "gathered"
    """How rows are multiplied by several adapters. gathered: each row by its adapter's gathered matrices; ragged: rows
    sorted by adapter, by `jax.lax.ragged_dot`."""

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> "AdapterConfig":
        check_keys_are_read(self, "adapter", selector="method", readers=METHOD_KEYS)
        if self.targets == [] or (self.method == "selective" and self.targets is None and self.layers is None):
            raise ValueError(
                f"adapter.targets: {self.targets} selects nothing to train; name modules, e.g. [q, v], or set "
                "adapter.layers"
            )
        if self.method == "tokens" and (min(self.tokens, default=-1) < 0 or len(set(self.tokens)) < len(self.tokens)):
            raise ValueError(f"adapter.tokens: {self.tokens} must list token ids, each once, e.g. [0, 7]")
        if min([self.rank, *self.ranks.values()]) < 1 or min([1.0, *self.alphas.values()]) <= 0:
            raise ValueError(f"adapter.ranks: {self.ranks} must be at least 1, adapter.alphas: {self.alphas} above 0")
        return self
