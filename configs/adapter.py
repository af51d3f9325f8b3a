"""Adapters: what is trained instead of the whole model."""

from typing import Any, Literal

from pydantic import Field, model_validator

from .base import Section

# Method -> the keys it reads beside `method` and `targets`.
LORA_KEYS = {"rank", "alpha", "rank_stabilized", "ranks", "alphas", "start", "ratio", "freeze_a", "dropout"}
METHOD_KEYS: dict[str, set[str]] = {
    "lora": LORA_KEYS,
    "dora": LORA_KEYS,
    "vera": {"rank", "dropout"},
    "ia3": set(),
    "oft": {"block"},
    "shira": {"rank"},
    "bitfit": set(),
    "norms": set(),
    "selective": set(),
}


class AdapterConfig(Section):
    """Train a few added or chosen weights and leave the rest of the model as it is."""

    method: Literal[tuple(METHOD_KEYS)] = "lora"  # type: ignore[valid-type]
    """lora (arXiv:2106.09685), dora (2402.09353), vera (2310.11454), ia3 (2205.05638), oft (2306.07280) and shira
    (2406.13175) add weights; bitfit (2106.10199) trains biases, norms the norms, selective what `targets` matches."""
    targets: list[str] | None = None
    """Patterns of module names: q is every layer's, layers/7/attn/* one layer's; selective: of weights. null: every
    linear map of the blocks (ia3: k, v, down; bitfit, norms: every bias, every norm; selective: every weight)."""
    layers: int | None = Field(None, ge=1)
    """Only in so many of the last blocks: below them nothing is trained and no backward pass runs; null: in all."""
    rank: int = Field(16, ge=1)
    """Width of the added maps (lora, dora, vera); shira trains as many entries as lora of this rank has."""
    block: int = Field(32, ge=2)
    """Inputs of a map that turn together (oft); it divides the inputs."""
    alpha: float | None = Field(None, gt=0)
    """The added map is multiplied by alpha / rank; null: alpha = rank."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)."""
    ranks: dict[str, int] = {}
    """Pattern -> rank of the modules it matches, the first match wins; others have `rank`."""
    alphas: dict[str, float] = {}
    """Pattern -> alpha of the modules it matches; others have `alpha`."""
    start: Literal["zero", "pissa", "olora", "loftq"] = "zero"
    """zero: the added map starts at zero; pissa (arXiv:2404.02948), olora (2406.01775): at the principal part of the
    weight, which is taken out of it; loftq (2310.08659): at what quantization loses."""
    ratio: float = Field(1.0, gt=0)
    """Learning rate of the second factor over that of the first (LoRA+, arXiv:2402.12354, advises 16)."""
    freeze_a: bool = False
    """Train the second factor only (LoRA-FA, arXiv:2308.03303)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of zeroing an element of what the added map reads, in training."""

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> "AdapterConfig":
        for name, field in type(self).model_fields.items():
            value: Any = getattr(self, name)
            if name in METHOD_KEYS[self.method] | {"method", "targets", "layers"} or value == field.default:
                continue
            readers = [method for method, keys in METHOD_KEYS.items() if name in keys]
            raise ValueError(
                f"adapter.{name}: {value!r} means nothing to method {self.method}; remove it, or set adapter.method to "
                f"{' or '.join(readers)}"
            )
        if self.targets == [] or (self.method == "selective" and self.targets is None and self.layers is None):
            raise ValueError(
                f"adapter.targets: {self.targets} leaves nothing to train; name modules, e.g. [q, v], or set "
                "adapter.layers"
            )
        if min([self.rank, *self.ranks.values()]) < 1 or min([1.0, *self.alphas.values()]) <= 0:
            raise ValueError(f"adapter.ranks: {self.ranks} must be at least 1, adapter.alphas: {self.alphas} above 0")
        return self
