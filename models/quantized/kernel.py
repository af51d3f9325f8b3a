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
from .bit_packing import packed, unpacked
from .interface import Leaves
from .registry import FORMATS


@dataclass(frozen=True)
class Form:
    """What the leaves of a kernel mean."""

    format: str
    group: int
    double: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    names: tuple[
        str | None, ...
    ] = ()  # of the activation dimensions that codes and scales are cut by; (): on one device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """One layer's kernel [inputs..., outputs...]."""

    leaves: Leaves
    form: Form = field(metadata={"static": True})

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
        return decoded(self.leaves, self.form).astype(dtype)

    def gathered(self, ctx: Context) -> "Quantized":
        """With its codes, not yet its weights, brought together from the devices of `fsdp`."""
        if not self.form.names:
            return self
        cut = {
            name: ctx.constrain(leaf, self.form.names) if leaf.ndim == len(self.form.names) else leaf
            for name, leaf in self.leaves.items()
        }
        return Quantized(cut, self.form)


class QuantizedKernel(nnx.Module):
    """Reads like the parameter in whose place it stands: `kernel[...]` is a `Quantized`."""

    def __init__(self, leaves: Leaves, form: Form):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))
        self.leaves, self.form = tuple(leaves), form

    def __getitem__(self, index: Any) -> Quantized:
        return Quantized({name: getattr(self, name)[index] for name in self.leaves}, self.form)


def product(x: jax.Array, kernel: jax.Array | Quantized, ctx: Context, *, inputs: int) -> jax.Array:
    """x kernel, over the last `inputs` dimensions of x [batch, sequence, ...] and the first of the kernel."""
    if not isinstance(kernel, Quantized):
        return ctx.linear(x, kernel.astype(ctx.compute), inputs=inputs)

    def multiply(x: jax.Array, kernel: Quantized) -> jax.Array:
        return ctx.linear(x, kernel.gathered(ctx).astype(ctx.compute), inputs=inputs)

    # Made again for the backward pass: kept, the kernels of all layers would be there at once.
    return jax.checkpoint(multiply)(x, kernel)


def encoded(kernel: jax.Array, form: Form) -> Leaves:
    """The leaves of one layer's kernel [inputs..., outputs...]."""
    size, outputs = math.prod(form.inputs), math.prod(form.outputs)
    kind = FORMATS[form.format]
    codes, statistics = kind.encode(kernel.astype(jnp.float32).reshape(size // form.group, form.group, outputs))
    if form.double:
        statistics |= double.encode(statistics["scale"])
    codes = packed(codes.reshape(size, outputs), bits=kind.bits)
    return {
        name: leaf.reshape(len(leaf), *form.outputs) if leaf.ndim == 2 else leaf
        for name, leaf in ({"codes": codes} | statistics).items()
    }


def decoded(leaves: Leaves, form: Form) -> jax.Array:
    """The kernel float32 [inputs..., outputs...] of one layer."""
    kind = FORMATS[form.format]
    outputs = math.prod(form.outputs)
    flat = {name: leaf.reshape(-1, outputs) if leaf.ndim > 1 else leaf for name, leaf in leaves.items()}
    if form.double:
        flat["scale"] = double.decode(flat)
    codes = unpacked(flat.pop("codes"), bits=kind.bits).reshape(-1, form.group, outputs)
    return kind.decode(codes, flat).reshape(*form.inputs, *form.outputs)
