"""The section quantization: the format of the blocks' frozen weights."""

from typing import Literal

from pydantic import Field, model_validator

from .adapter import AdapterConfig
from .base import Section
from .model import ModelConfig

# Format -> bits of a code.
BITS = {"nf4": 4, "int8": 8, "int4": 4, "int3": 3, "int2": 2}


class QuantizationConfig(Section):
    """Quantize the frozen linear maps of the blocks; each is dequantized when it multiplies.

    Embedding, head, norms and biases are not quantized.
    """

    format: Literal[tuple(BITS)] = "nf4"  # type: ignore[valid-type]
    """nf4: sixteen levels for normally distributed weights (QLoRA, arXiv:2305.14314); int8, int4, int3, int2: even
    steps from the smallest to the largest weight of a group."""
    group: int = Field(64, ge=8, multiple_of=8)
    """How many weights along the inputs of a linear map share a scale."""
    double: bool = False
    """Quantize the scales too (nf4): 0.127 in place of 0.5 bits per weight at group 64."""
    trained: bool = False
    """Quantize the linear maps that adapter.method selective trains too, and update their codes, without a copy in
    higher precision; scales are constant (int8; quantization-aware scaling, arXiv:2206.15472)."""

    @model_validator(mode="after")
    def _everything_has_an_effect(self) -> "QuantizationConfig":
        if self.trained and self.format != "int8":
            raise ValueError(
                f"quantization.trained: true with format {self.format}, whose steps are too coarse to train; use int8, "
                "or set it to false"
            )
        if self.double and self.format != "nf4":
            raise ValueError(
                f"quantization.double: true has no effect on format {self.format}; set it to false, or use nf4"
            )
        return self


def check_quantization(
    quantization: QuantizationConfig | None, adapter: AdapterConfig | None, model: ModelConfig, *, recipe: str
) -> None:
    """Raise ValueError where the section conflicts with the adapter or the recipe."""
    if quantization is None:
        if recipe == "lrec":
            raise ValueError(
                "recipe.name: lrec repairs a quantized model, but quantization is null; add quantization: {format: "
                "int3}"
            )
        if adapter is not None and adapter.start == "loftq":
            raise ValueError(
                "adapter.start: loftq fits the error of quantization, but quantization is null; add quantization: "
                "{format: nf4}"
            )
        return
    if adapter is None:
        raise ValueError(
            f"quantization.format: {quantization.format} with adapter: null would train quantized weights; add an "
            "adapter, e.g. adapter: {method: lora}, or remove quantization"
        )
    if quantization.trained and adapter.method != "selective":
        raise ValueError(
            f"quantization.trained: true, but adapter.method {adapter.method} trains no linear map of the model; use "
            "selective, or set it to false"
        )
    check_groups(quantization, model, {"fsdp": 1, "tensor": 1})


def check_trained_codes(quantization: QuantizationConfig | None, *, average: float | None, replicated: bool) -> None:
    """Raise ValueError where trained codes would be averaged, because a mean of codes is not a code."""
    if quantization is None or not quantization.trained:
        return
    if average is not None:
        raise ValueError(
            f"optimizer.ema: {average} cannot average quantized weights; remove it, or quantization.trained"
        )
    if replicated:
        raise ValueError(
            "quantization.trained: true with outer, which averages the weights of replicas; set it to false, or outer "
            "to null"
        )


def check_groups(quantization: QuantizationConfig, model: ModelConfig, axes: dict[str, int]) -> None:
    """Raise ValueError where a group of weights would be split over two devices of mesh `axes` (axis -> size)."""
    group, width = quantization.group, model.heads * model.head_width
    maps = {"embed": (model.embed, "fsdp"), "heads x head_dim": (width, "tensor"), "mlp": (model.mlp, "tensor")}
    for name, (inputs, axis) in maps.items():
        if inputs % axes[axis] or (inputs // axes[axis]) % group:
            sharded = f" over mesh.{axis} ({axes[axis]})" if axes[axis] > 1 else ""
            raise ValueError(
                f"quantization.group: {group} does not divide model.{name} ({inputs}){sharded}; use a divisor of a "
                "device's part, so that no group is split over devices"
            )
