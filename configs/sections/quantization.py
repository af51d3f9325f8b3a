"""Quantized bases: how the frozen weights of the blocks are kept."""

from typing import Literal

from pydantic import Field, model_validator

from .adapter import AdapterConfig
from .base import Section
from .model import ModelConfig

# Format -> bits of a code.
BITS = {"nf4": 4, "int8": 8, "int4": 4, "int3": 3, "int2": 2}


class QuantizationConfig(Section):
    """Keep the linear maps of the blocks that are not trained in few bits; each is made whole where it is multiplied.

    Embedding, head, norms and biases stay as they are.
    """

    format: Literal[tuple(BITS)] = "nf4"  # type: ignore[valid-type]
    """nf4: sixteen levels placed for normal weights (QLoRA, arXiv:2305.14314); int: even steps from a group's least to
    its largest."""
    group: int = Field(64, ge=8, multiple_of=8)
    """Weights along a map's inputs that share a scale."""
    double: bool = False
    """Quantize the scales too: 0.127 in place of 0.5 bits a weight at group 64 (nf4)."""
    trained: bool = False
    """Keep the linear maps that adapter.method selective trains in codes too, and train these: no copy in full is kept,
    scales stay (int8; quantization-aware scaling, arXiv:2206.15472)."""

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> "QuantizationConfig":
        if self.trained and self.format != "int8":
            raise ValueError(
                f"quantization.trained: true, but a step of {self.format} is too long to learn by; use int8, or set it "
                "to false"
            )
        if self.double and self.format != "nf4":
            raise ValueError(f"quantization.double: true means nothing to format {self.format}; remove it, or use nf4")
        return self


def check_quantization(
    quantization: QuantizationConfig | None, adapter: AdapterConfig | None, model: ModelConfig, *, recipe: str
) -> None:
    """Raise ValueError where a run cannot have the base it asks for."""
    if quantization is None:
        if recipe == "lrec":
            raise ValueError(
                "recipe.name: lrec repairs a quantized base and there is none; add quantization: {format: int3}"
            )
        if adapter is not None and adapter.start == "loftq":
            raise ValueError("adapter.start: loftq starts at what quantization loses; add quantization: {format: nf4}")
        return
    if adapter is None:
        raise ValueError(
            f"quantization: {quantization.format} weights cannot be trained; add an adapter, e.g. adapter: {{method: "
            "lora}, or remove quantization"
        )
    if quantization.trained and adapter.method != "selective":
        raise ValueError(
            f"quantization.trained: true, but adapter.method {adapter.method} trains no linear map as it is; use "
            "selective, or set it to false"
        )
    check_groups(quantization, model, {"fsdp": 1, "tensor": 1})


def check_trained_codes(quantization: QuantizationConfig | None, *, average: float | None, replicated: bool) -> None:
    """Raise ValueError where something would be made of codes that is none."""
    if quantization is None or not quantization.trained:
        return
    if average is not None:
        raise ValueError(f"optimizer.ema: {average} of codes is no code; remove it with quantization.trained")
    if replicated:
        raise ValueError(
            "outer: what replicas agree on is no code; set quantization.trained to false, or outer to null"
        )


def check_groups(quantization: QuantizationConfig, model: ModelConfig, axes: dict[str, int]) -> None:
    """Raise ValueError where a group of weights would lie on two devices of mesh `axes` (axis -> size)."""
    group, width = quantization.group, model.heads * model.head_width
    maps = {"embed": (model.embed, "fsdp"), "heads x head_dim": (width, "tensor"), "mlp": (model.mlp, "tensor")}
    for name, (inputs, axis) in maps.items():
        if inputs % axes[axis] or (inputs // axes[axis]) % group:
            share = f" over mesh.{axis} ({axes[axis]})" if axes[axis] > 1 else ""
            raise ValueError(
                f"quantization.group: {group} does not divide model.{name} ({inputs}){share}; a group must not "
                "straddle devices: use a divisor of a device's part"
            )
