"""The section model: settings of the decoder, and families, each of which is a set of defaults for the other keys.

A setting that has no effect with the others is refused, so that a model is never imported almost right.
"""

import itertools
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PrivateAttr, model_validator

from ..huggingface import read_model_section
from .base import Section

# Family -> its defaults; a key that the user writes wins.
FAMILIES: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "families.yaml").read_text(encoding="utf-8")
)

# `model.attention` -> the `mesh.platform` that it needs, where it is a kernel for one kind of device.
KERNEL_PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}


class RopeConfig(Section):
    """Rotary position embedding (RoFormer, arXiv:2104.09864) on half-split pairs, and its scaling to long sequences."""

    theta: float = Field(10000.0, gt=1)
    """Base of the rotation's wavelengths."""
    local_theta: float | None = Field(None, gt=1)
    """Base in layers with a sliding window, never scaled; null: the same as `theta`."""
    scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How a model that was trained at `original_length` reads longer sequences."""
    factor: float = Field(1.0, ge=1)
    """New length over `original_length`."""
    original_length: int = Field(8192, ge=1)
    """Sequence length before scaling, in tokens (llama3, yarn)."""
    low_frequency_factor: float = Field(1.0, gt=0)
    """llama3: wavelengths above original_length / this are scaled fully."""
    high_frequency_factor: float = 4.0
    """llama3: wavelengths below original_length / this are not scaled."""
    beta_fast: float = 32.0
    """yarn: a dimension with more rotations than this over original_length is not scaled."""
    beta_slow: float = Field(1.0, gt=0)
    """yarn: a dimension with fewer rotations than this over original_length is scaled fully."""
    attention_factor: float | None = Field(None, gt=0)
    """yarn: factor on cos and sin; null: 0.1 ln(factor) + 1."""

    @model_validator(mode="after")
    def _consistent(self) -> "RopeConfig":
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(
                f"model.rope.factor: {self.factor} has no effect without model.rope.scaling; "
                "set it to linear, llama3 or yarn"
            )
        if not self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(
                f"model.rope.low_frequency_factor: {self.low_frequency_factor} must be below "
                f"model.rope.high_frequency_factor ({self.high_frequency_factor})"
            )
        if not self.beta_slow < self.beta_fast:
            raise ValueError(
                f"model.rope.beta_slow: {self.beta_slow} must be below model.rope.beta_fast ({self.beta_fast})"
            )
        return self


class ModelConfig(Section):
    """One decoder-only transformer. `family` sets defaults; every key can be set by itself."""

    origin: str | None = Field(None, alias="from")
    """A Hugging Face model directory. Its config.json sets the keys below (a key that the user writes wins), and
    training starts from its weights. null: training starts from random weights."""
    family: Literal[tuple(FAMILIES)] = "llama"  # type: ignore[valid-type]
    """Set of defaults for the keys of the architecture."""
    vocab: int = Field(2048, ge=1)
    """Number of token ids; at least the size of the tokenizer."""
    vocab_multiple: int = Field(128, ge=1)
    """Embedding and head are padded to a multiple of this many rows, and the padding is masked; mesh.tensor must divide
    it."""
    layers: int = Field(4, ge=1)
    """Number of blocks."""
    embed: int = Field(192, ge=1)
    """Width of the residual stream."""
    heads: int = Field(6, ge=1)
    """Number of query heads."""
    kv_heads: int | None = Field(None, ge=1)
    """Number of key and value heads (grouped-query attention, arXiv:2305.13245); null: as many as `heads`."""
    head_dim: int | None = Field(None, ge=1)
    """Width of a head; null: embed / heads."""
    mlp: int = Field(512, ge=1)
    """Hidden width of the feed-forward part."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm (arXiv:1910.07467) or LayerNorm."""
    norm_epsilon: float = Field(1e-5, gt=0)
    """Added to the variance before its square root."""
    norm_unit_offset: bool = False
    """Multiply by 1 + scale, with scale starting at zero (Gemma)."""
    pre_norms: bool = True
    """Normalize the input of attention and MLP; false: they read the residual stream itself (OLMo 2)."""
    post_norms: bool = False
    """Normalize the output of attention and MLP before the residual sum (Gemma 2, 3, OLMo 2)."""
    qk_norm: bool = False
    """RMSNorm of each query and key head before rotation (Qwen 3, Gemma 3)."""
    qk_norm_whole: bool = False
    """`qk_norm` over all heads of a token together, not over each head (OLMo 2)."""
    qkv_bias: bool = False
    """Biases on q, k, v (Qwen 2)."""
    linear_bias: bool = False
    """Biases on the attention projection and the MLP (GPT-2)."""
    activation: Literal["swiglu", "geglu", "gelu"] = "swiglu"
    """swiglu and geglu have a gate (arXiv:2002.05202); gelu has none. GELU is the tanh form (GPT-2, Gemma)."""
    position_encoding: Literal["rope", "learned", "none"] = "rope"
    """How positions are encoded: rotation of queries and keys, a learned table, or not at all."""
    max_positions: int = Field(1024, ge=1)
    """Rows of the learned table of positions; read with position_encoding learned only."""
    rope: RopeConfig = RopeConfig()
    """Frequencies of the rotation and their scaling."""
    tied_embeddings: bool = False
    """Use the transposed embedding as the head."""
    embedding_scale: bool = False
    """Multiply embeddings by sqrt(embed) (Gemma)."""
    windows: tuple[int | None, ...] = (None,)
    """Sliding window of each layer, in tokens that a query sees, itself included; the pattern repeats over the layers.
    null is full attention."""
    attention_softcap: float | None = Field(None, gt=0)
    """Scores become cap * tanh(scores / cap) (Gemma 2); null: no cap."""
    logit_softcap: float | None = Field(None, gt=0)
    """Logits become cap * tanh(logits / cap) (Gemma 2); null: no cap."""
    attention_scale: float | None = Field(None, gt=0)
    """Factor on scores; null: head_dim ** -0.5."""
    parallel_block: bool = False
    """Attention and MLP read the same norm and are added together (GPT-J, PaLM)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an element of the outputs of attention and MLP, in training."""
    attention: Literal["auto", "dense", "blockwise", "cudnn", "splash"] = "auto"
    """Implementation of attention; auto: cudnn on a GPU and splash on a TPU where they are exact, else blockwise."""
    scan: bool = True
    """Scan one compiled block over the stack; false: unroll it (faster steps on a CPU, slower compilation)."""

    _cuts: tuple[int, ...] = PrivateAttr(())  # layers at which a new segment starts (configs/trained_segments.py)

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        keys = {field.alias or name for name, field in cls.model_fields.items()}
        if values.get("from") and not keys <= values.keys():  # a resolved section no longer needs the file
            imported = read_model_section(values["from"])
            rope = {"rope": imported["rope"] | values["rope"]} if "rope" in imported and "rope" in values else {}
            values = imported | values | rope
        family = FAMILIES.get(values.get("family", "llama"), {})
        merged = family | values
        if "rope" not in values and merged.get("position_encoding", "rope") != "rope":
            merged.pop("rope", None)  # the family's rope has no effect in a model without rope
        if isinstance(values.get("rope"), dict):
            merged["rope"] = family.get("rope", {}) | values["rope"]
        return merged

    @model_validator(mode="after")
    def _sizes(self) -> "ModelConfig":
        if self.heads % self.key_value_heads:
            raise ValueError(
                f"model.kv_heads: {self.kv_heads} does not divide model.heads ({self.heads}); use a divisor of it"
            )
        if self.head_dim is None and self.embed % self.heads:
            raise ValueError(
                f"model.embed: {self.embed} is not divisible by model.heads ({self.heads}); set model.head_dim"
            )
        if self.position_encoding == "rope" and self.head_width % 2:
            raise ValueError(
                f"model.head_dim: {self.head_width} must be even for rope, which rotates pairs; "
                f"set model.head_dim to {self.head_width + 1}"
            )
        if not self.windows or any(window is not None and window < 1 for window in self.windows):
            raise ValueError(
                f"model.windows: {list(self.windows)} must list positive token counts or null, at least one"
            )
        return self

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> "ModelConfig":
        if self.norm == "layer" and self.norm_unit_offset and not self.qk_norm:
            raise ValueError(
                "model.norm_unit_offset: true has no effect on model.norm: layer; use norm: rms, or set it to false"
            )
        if self.qk_norm_whole and not self.qk_norm:
            raise ValueError("model.qk_norm_whole: true has no effect without model.qk_norm; set both or neither")
        if not self.pre_norms and (self.parallel_block or not self.post_norms):
            raise ValueError(
                f"model.pre_norms: false with model.post_norms: {self.post_norms} and model.parallel_block: "
                f"{self.parallel_block}; a block without any norm, or that shares one, does not train: use post_norms: "
                "true and parallel_block: false"
            )
        if self.position_encoding != "rope" and self.rope != RopeConfig():
            raise ValueError(
                f"model.rope: has no effect with model.position_encoding: {self.position_encoding}; remove one of them"
            )
        if self.rope.local_theta is not None and set(self.windows) == {None}:
            raise ValueError(
                f"model.rope.local_theta: {self.rope.local_theta} has no effect without a layer with a sliding "
                "window; set model.windows, or set it to null"
            )
        if self.attention == "cudnn" and self.attention_softcap is not None:
            raise ValueError(
                f"model.attention: cudnn cannot cap scores (model.attention_softcap: {self.attention_softcap}); "
                "use auto or blockwise"
            )
        return self

    @property
    def key_value_heads(self) -> int:
        """`kv_heads`, or `heads` where it is null."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        """`head_dim`, or embed / heads where it is null."""
        return self.head_dim or self.embed // self.heads

    @property
    def padded_vocab(self) -> int:
        """`vocab` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab // self.vocab_multiple) * self.vocab_multiple

    @property
    def segments(self) -> tuple[tuple[tuple[int | None, ...], int], ...]:
        """(pattern of windows, repeats) of each segment in order; a last segment has the layers that fill no pattern.

        >>> ModelConfig(layers=8, windows=[1024, 1024, None]).segments
        (((1024, 1024, None), 2), ((1024, 1024), 1))
        """
        edges = (0, *self._cuts, self.layers)
        return tuple(
            segment
            for first, end in itertools.pairwise(edges)
            for segment in pattern_segments(self.windows, first=first, count=end - first)
        )


def pattern_segments(
    windows: tuple[int | None, ...], *, first: int, count: int
) -> list[tuple[tuple[int | None, ...], int]]:
    """(pattern, repeats) of the `count` layers from layer `first` on; those that fill no pattern come last."""
    start = first % len(windows)
    pattern = windows[start:] + windows[:start]
    repeats, rest = divmod(count, len(windows))
    return [(kinds, times) for kinds, times in ((pattern, repeats), (pattern[:rest], 1)) if kinds and times]
