"""The two kinds of adapter methods.

A `LinearMethod` adapts linear maps. It is three pure functions of one layer and the names of the leaves it trains:

    init(key, kernel, context) -> kernel, leaves      before the first step
    apply(leaves, x, base, ctx) -> y                  the adapted map
    merge(leaves, base) -> base                       the plain map that computes the same

An `AddedModule` adds NNX modules elsewhere: at paths of their own in the decoder, which calls them.
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
from ..quantized.kernel import QuantizedArray, linear_product

Leaves = dict[str, jax.Array]
Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class InitContext:
    """What an initializer knows about the layer besides its key and kernel."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scale: jax.Array  # [rank] float32; zeros where the layer has no adapter, or a narrower one
    is_down_projection: bool  # ia3 scales the input of this map, and the output of all others
    rank: int = 1  # shira: decides how many entries are trained
    block: int = 1  # oft: how many inputs turn together
    fake_quantize: Callable[[jax.Array], jax.Array] = lambda kernel: kernel  # the kernel as it reads once quantized


@dataclass(frozen=True)
class BaseLinear:
    """The linear map that an adapter adapts."""

    kernel: jax.Array | QuantizedArray  # [inputs..., outputs...]
    bias: jax.Array | None  # [outputs...]
    inputs: int  # how many dimensions of the kernel are inputs
    dropout_rate: float = 0.0  # of the input of the added map
    map_index: int = 0  # of the map in its block
    kernel_axes: Axes | None = None  # logical axes shared with activations; None: on one device

    def multiply(self, x: jax.Array, ctx: Context) -> jax.Array:
        """x kernel, without the bias."""
        return linear_product(x, self.kernel, ctx, inputs=self.inputs)

    def gathered_kernel(self, ctx: Context) -> jax.Array:
        """The kernel in float32, gathered over `fsdp`, as the product needs it anyway."""
        kernel = self.kernel.astype(jnp.float32)
        return kernel if self.kernel_axes is None else ctx.constrain(kernel, self.kernel_axes)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """y + bias."""
        return y if self.bias is None else y + self.bias.astype(y.dtype)

    def dropout(self, x: jax.Array, ctx: Context) -> jax.Array:
        """`x` after dropout, which is active in training only."""
        salt = 2 + self.map_index  # the block itself uses 0 and 1
        return dropout(x, ctx.dropout_keys, rate=self.dropout_rate, salt=salt, index=ctx.index)

    def replace(self, **changes: Any) -> "BaseLinear":
        """A copy with another kernel or bias."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, eq=False)  # compared and hashed by identity, as a part of the model's graph definition
class LinearMethod:
    """One method that adapts linear maps."""

    initializers: Mapping[str, Callable[[jax.Array, jax.Array, InitContext], tuple[jax.Array, Leaves]]]
    """`adapter.start` -> (key, kernel, context) -> (kernel, leaves)."""
    apply: Callable[[Leaves, jax.Array, BaseLinear, Context], jax.Array]
    merge: Callable[[Leaves, BaseLinear], BaseLinear]
    trained_leaves: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class AddedModule:
    """One method, or a part of one, that adds modules elsewhere than to linear maps."""

    init: Callable[[Any, ModelConfig, AdapterConfig, jax.Array], dict[str, Leaves]]
    """(weights, model, adapter, key) -> path of each module in the decoder -> its leaves before the first step."""
    make_module: Callable[[Leaves], nnx.Module]
    trained_suffixes: tuple[str, ...]  # the paths of trained leaves end in one of these
    merge: Callable[[Any, AdapterConfig], Any] | None = None  # (tree, adapter) -> plain weights; None: cannot be merged
    is_prefix: bool = False  # whether it puts `adapter.length` tokens in front of every document


class LeafModule(nnx.Module):
    """A module with one parameter for each leaf, by its name."""

    def __init__(self, leaves: Leaves):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))


class Adapter(LeafModule):
    """The leaves of one method beside the kernel of the map that they adapt."""

    def __init__(self, method: LinearMethod, leaves: Leaves, *, dropout_rate: float, map_index: int, kernel_axes: Axes):
        super().__init__(leaves)
        self.method, self.leaf_names, self.dropout_rate = method, tuple(leaves), dropout_rate
        self.map_index, self.kernel_axes = map_index, kernel_axes

    def __call__(
        self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, ctx: Context, *, inputs: int
    ) -> jax.Array:
        """x [batch, sequence, inputs...] -> [batch, sequence, outputs...]."""
        leaves = {name: getattr(self, name)[...] for name in self.leaf_names}
        base = BaseLinear(kernel, bias, inputs, self.dropout_rate, self.map_index, self.kernel_axes)
        return self.method.apply(leaves, x, base, ctx)
