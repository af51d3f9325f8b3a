"""A kernel in few bits, in the place of the array it stands for.

    codes [inputs bits / 8, outputs...] uint8    scale [inputs / group, outputs...]    and what else the format has

Groups lie along the inputs, flattened where there are several, so that a device that holds some inputs or outputs of
the kernel holds their groups whole. `product` makes the kernel of one layer and forgets it.
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
    """What the leaves of a kernel mean."""

    format: str
    group: int
    double: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[
        str | None, ...
    ] = ()  # of the activation dimensions that codes and scales are cut by; (): on one device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedArray:
    """One layer's kernel [inputs..., outputs...]."""

    leaves: Leaves
    form: KernelLayout = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel it stands for."""
        return (*self.form.inputs, *self.form.outputs)

    @property
    def ndim(self) -> int:
        """Of the kernel it stands for."""
        return len(self.shape)

    def astype(self, dtype: Any) -> jax.Array:
        """The kernel itself."""
        return dequantize_kernel(self.leaves, self.form).astype(dtype)

    def gathered(self, ctx: Context) -> "QuantizedArray":
        """With its codes, not yet its weights, brought together from the devices of `fsdp`."""
        if not self.form.axes:
            return self
        cut = {
            name: ctx.constrain(leaf, self.form.axes) if leaf.ndim == len(self.form.axes) else leaf
            for name, leaf in self.leaves.items()
        }
        return QuantizedArray(cut, self.form)


class QuantizedKernel(nnx.Module):
    """Reads like the parameter in whose place it stands: `kernel[...]` is a `Quantized`."""

    def __init__(self, leaves: Leaves, form: KernelLayout):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))
        self.leaves, self.form = tuple(leaves), form

    def __getitem__(self, index: Any) -> QuantizedArray:
        return QuantizedArray({name: getattr(self, name)[index] for name in self.leaves}, self.form)


def linear_product(x: jax.Array, kernel: jax.Array | QuantizedArray, ctx: Context, *, inputs: int) -> jax.Array:
    """x kernel, over the last `inputs` dimensions of x [batch, sequence, ...] and the first of the kernel."""
    if not isinstance(kernel, QuantizedArray):
        return ctx.linear(x, kernel.astype(ctx.compute_dtype), inputs=inputs)

    def multiply(x: jax.Array, kernel: QuantizedArray) -> jax.Array:
        return ctx.linear(x, kernel.gathered(ctx).astype(ctx.compute_dtype), inputs=inputs)

    # Made again for the backward pass: kept, the kernels of all layers would be there at once.
    return jax.checkpoint(multiply)(x, kernel)


def quantize_kernel(kernel: jax.Array, layout: KernelLayout) -> Leaves:
    """The leaves of one layer's kernel [inputs..., outputs...]."""
    size, outputs = math.prod(layout.inputs), math.prod(layout.outputs)
    kind = FORMATS[layout.format]
    codes, statistics = kind.encode(kernel.astype(jnp.float32).reshape(size // layout.group, layout.group, outputs))
    if layout.double:
        statistics |= double.quantize_scales(statistics["scale"])
    codes = pack_codes(codes.reshape(size, outputs), bits=kind.bits)
    return {
        name: leaf.reshape(len(leaf), *layout.outputs) if leaf.ndim == 2 else leaf
        for name, leaf in ({"codes": codes} | statistics).items()
    }


def dequantize_kernel(leaves: Leaves, layout: KernelLayout) -> jax.Array:
    """The kernel float32 [inputs..., outputs...] of one layer."""
    kind = FORMATS[layout.format]
    outputs = math.prod(layout.outputs)
    flat = {name: leaf.reshape(-1, outputs) if leaf.ndim > 1 else leaf for name, leaf in leaves.items()}
    if layout.double:
        flat["scale"] = double.dequantize_scales(flat)
    codes = unpack_codes(flat.pop("codes"), bits=kind.bits).reshape(-1, layout.group, outputs)
    return kind.decode(codes, flat).reshape(*layout.inputs, *layout.outputs)
