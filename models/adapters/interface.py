"""What a method that adds weights is. To linear maps: pure functions of one layer, and which leaves it trains.

start(key, kernel, context) -> kernel, leaves        before the first step
apply(leaves, x, base, ctx) -> y                   the adapted map
merge(leaves, base) -> base                      the plain map that computes the same

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
from ..quantized.kernel import QuantizedArray, linear_product

Leaves = dict[str, jax.Array]


@dataclass(frozen=True)
class InitContext:
    """What the start of one layer's adapter is told."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scale: jax.Array  # [rank] float32; zeros: this layer has none, or is narrower
    is_down_projection: bool  # ia3: the map is scaled where it reads
    rank: int = 1  # shira: how many entries
    block: int = 1  # oft: inputs that turn together
    fake_quantize: Callable[[jax.Array], jax.Array] = lambda kernel: (
        kernel
    )  # what the kernel will be once it is quantized


@dataclass(frozen=True)
class BaseLinear:
    """The linear map an adapter sits in."""

    kernel: jax.Array | QuantizedArray  # [inputs..., outputs...]
    bias: jax.Array | None  # [outputs...]
    inputs: int  # dimensions that are inputs
    dropout_rate: float = 0.0  # of dropout before the added map
    map_index: int = 0  # of the map in its block
    kernel_axes: tuple[str | None, ...] | None = (
        None  # activation dimensions that the kernel's are; None: on one device
    )

    def multiply(self, x: jax.Array, ctx: Context) -> jax.Array:
        """x kernel."""
        return linear_product(x, self.kernel, ctx, inputs=self.inputs)

    def gathered_kernel(self, ctx: Context) -> jax.Array:
        """The kernel in float32, no longer cut over `fsdp`: as the product needs it anyway."""
        kernel = self.kernel.astype(jnp.float32)
        return kernel if self.kernel_axes is None else ctx.constrain(kernel, self.kernel_axes)

    def add_bias(self, y: jax.Array) -> jax.Array:
        """y + bias."""
        return y if self.bias is None else y + self.bias.astype(y.dtype)

    def dropout(self, x: jax.Array, ctx: Context) -> jax.Array:
        """x with elements zeroed, in training."""
        salt = 2 + self.map_index  # the block itself has 0 and 1
        return dropout(x, ctx.dropout_keys, rate=self.dropout_rate, salt=salt, index=ctx.index)

    def replace(self, **changes: Any) -> "BaseLinear":
        """With another kernel or bias."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, eq=False)  # compared, and hashed in a model's structure, as the one object it is
class LinearMethod:
    """One way to adapt linear maps."""

    initializers: Mapping[
        str, Callable[[jax.Array, jax.Array, InitContext], tuple[jax.Array, Leaves]]
    ]  # by `adapter.start`
    apply: Callable[[Leaves, jax.Array, BaseLinear, Context], jax.Array]
    merge: Callable[[Leaves, BaseLinear], BaseLinear]
    trained_leaves: tuple[str, ...]  # names of the leaves that learn


@dataclass(frozen=True, eq=False)
class AddedModule:
    """One way to add elsewhere than to linear maps."""

    init: Callable[[Any, ModelConfig, AdapterConfig, jax.Array], dict[str, Leaves]]
    """(weights, model, adapter, key) -> path of a module in the run -> its leaves before the first step."""
    make_module: Callable[[Leaves], nnx.Module]
    trained_suffixes: tuple[str, ...]  # ends of the paths of the leaves that learn
    merge: Callable[[Any, AdapterConfig], Any] | None = None  # (tree, adapter) -> plain weights; None: there are none
    is_prefix: bool = False  # puts the keys of `adapter.length` tokens in front of every document


class Adapter(nnx.Module):
    """The leaves of one method, beside the kernel of the map they adapt."""

    def __init__(
        self, method: LinearMethod, leaves: Leaves, *, rate: float, number: int, names: tuple[str | None, ...]
    ):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))
        self.method, self.dropout_rate, self.map_index = method, rate, number
        self.leaves, self.kernel_names = tuple(leaves), names

    def __call__(
        self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, ctx: Context, *, inputs: int
    ) -> jax.Array:
        """x [batch, sequence, inputs...] -> [batch, sequence, outputs...]."""
        leaves = {name: getattr(self, name)[...] for name in self.leaves}
        base = BaseLinear(kernel, bias, inputs, self.dropout_rate, self.map_index, self.kernel_names)
        return self.method.apply(leaves, x, base, ctx)
