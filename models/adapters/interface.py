"""What a method that adds weights is. To linear maps: pure functions of one layer, and which leaves it trains.

start(key, kernel, setting) -> kernel, leaves        before the first step
apply(leaves, x, inside, ctx) -> y                   the adapted map
merge(leaves, inside) -> inside                      the plain map that computes the same

Anywhere else: an `Addition`, modules at paths of their own in the decoder, which asks them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..context import Context
from ..layers import dropout
from ..quantized.kernel import Quantized, product

Leaves = dict[str, jax.Array]


@dataclass(frozen=True)
class Setting:
    """What the start of one layer's adapter is told."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scale: jax.Array  # [rank] float32; zeros: this layer has none, or is narrower
    scales_input: bool  # ia3: the map is scaled where it reads
    rank: int = 1  # shira: how many entries
    block: int = 1  # oft: inputs that turn together
    read: Callable[[jax.Array], jax.Array] = lambda kernel: kernel  # what the kernel will be once it is quantized


@dataclass(frozen=True)
class Inside:
    """The linear map an adapter sits in."""

    kernel: jax.Array | Quantized  # [inputs..., outputs...]
    bias: jax.Array | None  # [outputs...]
    inputs: int  # dimensions that are inputs
    rate: float = 0.0  # of dropout before the added map
    number: int = 0  # of the map in its block
    names: tuple[str | None, ...] | None = None  # activation dimensions that the kernel's are; None: on one device

    def product(self, x: jax.Array, ctx: Context) -> jax.Array:
        """x kernel."""
        return product(x, self.kernel, ctx, inputs=self.inputs)

    def whole_kernel(self, ctx: Context) -> jax.Array:
        """The kernel in float32, no longer cut over `fsdp`: as the product needs it anyway."""
        kernel = self.kernel.astype(jnp.float32)
        return kernel if self.names is None else ctx.constrain(kernel, self.names)

    def biased(self, y: jax.Array) -> jax.Array:
        """y + bias."""
        return y if self.bias is None else y + self.bias.astype(y.dtype)

    def dropped(self, x: jax.Array, ctx: Context) -> jax.Array:
        """x with elements zeroed, in training."""
        salt = 2 + self.number  # the block itself has 0 and 1
        return dropout(x, ctx.dropout_keys, rate=self.rate, salt=salt, index=ctx.index)

    def replaced(self, **changes: Any) -> "Inside":
        """With another kernel or bias."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, eq=False)  # compared, and hashed in a model's structure, as the one object it is
class Method:
    """One way to adapt linear maps."""

    starts: Mapping[str, Callable[[jax.Array, jax.Array, Setting], tuple[jax.Array, Leaves]]]  # by `adapter.start`
    apply: Callable[[Leaves, jax.Array, Inside, Context], jax.Array]
    merge: Callable[[Leaves, Inside], Inside]
    trained: tuple[str, ...]  # names of the leaves that learn


@dataclass(frozen=True, eq=False)
class Addition:
    """One way to add elsewhere than to linear maps."""

    start: Callable[[Any, ModelConfig, AdapterConfig, jax.Array], dict[str, Leaves]]
    """(weights, model, adapter, key) -> path of a module in the run -> its leaves before the first step."""
    module: Callable[[Leaves], nnx.Module]
    trained: tuple[str, ...]  # ends of the paths of the leaves that learn
    merge: Callable[[Any, AdapterConfig], Any] | None = None  # (tree, adapter) -> plain weights; None: there are none
    ahead: bool = False  # puts the keys of `adapter.length` tokens in front of every document


class Adapter(nnx.Module):
    """The leaves of one method, beside the kernel of the map they adapt."""

    def __init__(self, method: Method, leaves: Leaves, *, rate: float, number: int, names: tuple[str | None, ...]):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))
        self.method, self.rate, self.number = method, rate, number
        self.leaves, self.kernel_names = tuple(leaves), names

    def __call__(
        self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, ctx: Context, *, inputs: int
    ) -> jax.Array:
        """x [batch, sequence, inputs...] -> [batch, sequence, outputs...]."""
        leaves = {name: getattr(self, name)[...] for name in self.leaves}
        inside = Inside(kernel, bias, inputs, self.rate, self.number, self.kernel_names)
        return self.method.apply(leaves, x, inside, ctx)
