"""Embedding, head and loss if every device has them whole: stage 0 embeds, the last stage computes the loss.

The head runs inside the last stage's backward pass, whose tick is that much longer: with a large vocabulary all other
devices wait for it (`vocab_parallel.py` is the remedy).
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..tables.table import Op
from .device import OpFunction, PipelineDevice
from .stage_functions import Carry, Row, add_sums, add_unstacked_gradient

COLLECTED_DIMENSIONS = (None, "batch", "sequence", None)  # of what `HiddenStateCollector` keeps


class ReplicatedEmbedHead:
    """Embedding, head and loss, whole on every device. Its methods are the interface of `PipelineDevice.embed_head`."""

    def initial_state(self, device: PipelineDevice, x: jax.ShapeDtypeStruct, dtype: Any) -> Any:
        """`Carry.head_state` before the first tick: nothing is kept between ticks."""
        del device, x, dtype
        return ()

    def metrics(self, device: PipelineDevice, x: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the sums besides the loss, from the shape of the last block's output `x`."""

        def compute(x: jax.Array) -> dict[str, jax.Array]:
            unstacked, frozen = device.weights.unstacked, device.frozen.unstacked
            inputs = device.microbatch_inputs(jnp.zeros((), jnp.int32))
            return device.functions.loss_head(unstacked, frozen, x, *inputs)[1][1]

        return jax.eval_shape(compute, x)

    def op_functions(self) -> dict[Op, OpFunction]:
        """Ops besides those of the blocks: none."""
        return {}

    def before_tick(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Exchanges at the start of a tick: none."""
        del device, row
        return carry

    def after_tick(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Exchanges at the end of a tick: none."""
        del device, row
        return carry

    def embed(self, device: PipelineDevice, row: Row, message: jax.Array) -> jax.Array:
        """The first block's input: the embedding of the microbatch's tokens."""
        del message
        fields, context = device.microbatch_inputs(row["microbatch"])
        return device.functions.embed(device.weights.unstacked, device.frozen.unstacked, fields, context, None)

    def begin_backward(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Turn `output`, the last stage's output, into the loss's gradient by it."""
        fields, context = device.microbatch_inputs(row["microbatch"])
        unstacked, frozen = device.weights.unstacked, device.frozen.unstacked
        untied = "head" in unstacked or "head" in frozen
        head = {name: value for name, value in unstacked.items() if not (untied and name == "embed")}

        def numerator(head: Any, hidden: jax.Array) -> tuple[jax.Array, Any]:
            return device.functions.loss_head(unstacked | head, frozen, hidden, fields, context)

        differentiated = jax.value_and_grad(numerator, argnums=(0, 1), has_aux=True)
        (loss, sums), (d_head, d_hidden) = differentiated(head, carry.output)
        return add_unstacked_gradient(add_sums(carry._replace(output=d_hidden), loss, *sums), d_head)

    def end_backward(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Add the embedding's gradient; `output` is the gradient of the first block's input."""
        fields, context = device.microbatch_inputs(row["microbatch"])
        unstacked, frozen = device.weights.unstacked, device.frozen.unstacked
        embed = {name: value for name, value in unstacked.items() if name == "embed"}
        _, pull = jax.vjp(lambda embed: device.functions.embed(unstacked | embed, frozen, fields, context, None), embed)
        return add_unstacked_gradient(carry, *pull(carry.output))

    def evaluate(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Add the loss of the last stage's output, in a table without a backward pass."""
        fields, context = device.microbatch_inputs(row["microbatch"])
        loss, sums = device.functions.loss_head(
            device.weights.unstacked, device.frozen.unstacked, carry.output, fields, context
        )
        return add_sums(carry, loss, *sums)


class HiddenStateCollector(ReplicatedEmbedHead):
    """Collects the head's input, [microbatches, rows, sequence, embed], of a model that goes forward only.

    The last stage has the values, and all other stages zeros.
    """

    def initial_state(self, device: PipelineDevice, x: jax.ShapeDtypeStruct, dtype: Any) -> jax.Array:
        """Zeros for all microbatches."""
        del dtype
        zeros = jnp.zeros((device.lowered.table.microbatches, *x.shape), x.dtype)
        return device.functions.constrain(zeros, COLLECTED_DIMENSIONS)

    def metrics(self, device: PipelineDevice, x: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
        """None: there is no loss."""
        del device, x
        return {}

    def evaluate(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Store the last stage's output after the final norm."""
        hidden = device.functions.final_norm(device.weights.unstacked, device.frozen.unstacked, carry.output)
        hidden = device.functions.constrain(hidden, COLLECTED_DIMENSIONS[1:])
        return carry._replace(head_state=carry.head_state.at[row["microbatch"]].set(hidden))
