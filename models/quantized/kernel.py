"""A quantized kernel: leaves of a few bits in the place of the array.

    codes [inputs bits / 8, outputs...] uint8    scale [inputs / group, outputs...]    and further leaves of the format

Groups lie along the inputs, flattened where there are several, so that a device with some inputs or outputs of the
kernel has whole groups. `linear_product` dequantizes the kernel of one layer, multiplies, and drops it.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..context import Context
from . import double_quantization as double
from .bit_packing import pack_codes, unpack_codes
from .interface import Leaves
from .registry import FORMATS


@dataclass(frozen=True)
class KernelLayout:
    """How to read the leaves of a quantized kernel."""

    format: str  # a name in FORMATS
    group: int  # inputs that share a scale
    double: bool  # whether the scales are quantized too
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str | None, ...] = ()  # logical axes that codes and scales share with activations; (): on one device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """The quantized kernel [inputs..., outputs...] of one layer."""

    leaves: Leaves
    layout: KernelLayout = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dequantized kernel."""
        return (*self.layout.inputs, *self.layout.outputs)

    @property
    def ndim(self) -> int:
        """Of the dequantized kernel."""
        return len(self.shape)

    def astype(self, dtype: Any) -> jax.Array:
        """The dequantized kernel."""
        return dequantize_kernel(self.leaves, self.layout).astype(dtype)

    def gather(self, ctx: Context) -> "QuantizedArray":
        """Gather the codes over `fsdp`: fewer bytes than the weights."""
        if not self.layout.axes:
            return self
        leaves = {
            name: ctx.constrain(leaf, self.layout.axes) if leaf.ndim == len(self.layout.axes) else leaf
            for name, leaf in self.leaves.items()
        }
        return QuantizedArray(leaves, self.layout)


class QuantizedKernel(nnx.Module):
    """Reads like the parameter that it replaces: `kernel[...]` is a `QuantizedArray`."""

    def __init__(self, leaves: Leaves, layout: KernelLayout):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))
        self.leaf_names, self.layout = tuple(leaves), layout

    def __getitem__(self, index: Any) -> QuantizedArray:
        return QuantizedArray({name: getattr(self, name)[index] for name in self.leaf_names}, self.layout)


def linear_product(x: jax.Array, kernel: jax.Array | QuantizedArray, ctx: Context, *, inputs: int) -> jax.Array:
    """x kernel, over the last `inputs` dimensions of x [batch, sequence, ...] and the first of the kernel."""
    if not isinstance(kernel, QuantizedArray):
        return ctx.linear(x, kernel.astype(ctx.compute_dtype), inputs=inputs)

    def multiply(x: jax.Array, kernel: QuantizedArray) -> jax.Array:
        return ctx.linear(x, kernel.gather(ctx).astype(ctx.compute_dtype), inputs=inputs)

    # Dequantized again for the backward pass: else the kernels of all layers would be in memory at once.
    return jax.checkpoint(multiply)(x, kernel)


def quantize_kernel(kernel: jax.Array, layout: KernelLayout) -> Leaves:
    """The leaves that hold one layer's kernel [inputs..., outputs...]."""
    size, outputs = math.prod(layout.inputs), math.prod(layout.outputs)
    code_format = FORMATS[layout.format]
    codes, statistics = code_format.encode(
        kernel.astype(jnp.float32).reshape(size // layout.group, layout.group, outputs)
    )
    if layout.double:
        statistics |= double.quantize_scales(statistics["scale"])
    codes = pack_codes(codes.reshape(size, outputs), bits=code_format.bits)
    return {
        name: leaf.reshape(len(leaf), *layout.outputs) if leaf.ndim == 2 else leaf
        for name, leaf in ({"codes": codes} | statistics).items()
    }


def dequantize_kernel(leaves: Leaves, layout: KernelLayout) -> jax.Array:
    """The kernel float32 [inputs..., outputs...] of one layer."""
    code_format = FORMATS[layout.format]
    outputs = math.prod(layout.outputs)
    flat = {name: leaf.reshape(-1, outputs) if leaf.ndim > 1 else leaf for name, leaf in leaves.items()}
    if layout.double:
        flat["scale"] = double.dequantize_scales(flat)
    codes = unpack_codes(flat.pop("codes"), bits=code_format.bits).reshape(-1, layout.group, outputs)
    return code_format.decode(codes, flat).reshape(*layout.inputs, *layout.outputs)
