"""Embedding, head and loss where each is whole on every device: stage 0 embeds, the last stage has the loss.

The head runs inside the last stage's backward pass, whose tick is that much longer: with a large vocabulary every other
device waits for it (`shared.py` is the remedy).
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..tables.table import Op
from .device import Device, Phase
from .stage_functions import Carry, Row, grown, summed

KEPT = (None, "batch", "sequence", None)  # dimensions of what `KeptEnds` keep


class WholeEnds:
    """The ends as each device has them whole."""

    def between(self, device: Device, x: jax.ShapeDtypeStruct, dtype: Any) -> tuple[()]:
        """Nothing is kept between ticks."""
        del device, x, dtype
        return ()

    def metrics(self, device: Device, x: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
        """Sums that are told besides the loss of a last block's output `x`."""

        def told(x: jax.Array) -> dict[str, jax.Array]:
            ends, frozen = device.weights.ends, device.frozen.ends
            return device.parts.leave(ends, frozen, x, *device.fields(jnp.zeros((), jnp.int32)))[1][1]

        return jax.eval_shape(told, x)

    def phases(self) -> dict[Op, Phase]:
        """No op but the blocks' is needed."""
        return {}

    def before(self, device: Device, row: Row, carry: Carry) -> Carry:
        """Nothing happens between devices at the start of a tick,"""
        del device, row
        return carry

    def after(self, device: Device, row: Row, carry: Carry) -> Carry:
        """or at its end."""
        del device, row
        return carry

    def enter(self, device: Device, row: Row, sent: jax.Array) -> jax.Array:
        """The first block's input: the embedding of the microbatch's tokens."""
        del sent
        fields, context = device.fields(row["microbatch"])
        return device.parts.enter(device.weights.ends, device.frozen.ends, fields, context, None)

    def begin_backward(self, device: Device, row: Row, carry: Carry) -> Carry:
        """`out`, what the last stage sent itself, becomes the loss's gradient by it."""
        fields, context = device.fields(row["microbatch"])
        ends, frozen = device.weights.ends, device.frozen.ends
        untied = "head" in ends or "head" in frozen
        head = {name: value for name, value in ends.items() if not (untied and name == "embed")}

        def numerator(head: Any, hidden: jax.Array) -> tuple[jax.Array, Any]:
            return device.parts.leave(ends | head, frozen, hidden, fields, context)

        differentiated = jax.value_and_grad(numerator, argnums=(0, 1), has_aux=True)
        (loss, rest), (d_head, d_hidden) = differentiated(head, carry.out)
        return grown(summed(carry._replace(out=d_hidden), loss, *rest), d_head)

    def end_backward(self, device: Device, row: Row, carry: Carry) -> Carry:
        """Add the embedding's gradient; `out` is that of the first block's input."""
        fields, context = device.fields(row["microbatch"])
        ends, frozen = device.weights.ends, device.frozen.ends
        embed = {name: value for name, value in ends.items() if name == "embed"}
        _, pull = jax.vjp(lambda embed: device.parts.enter(ends | embed, frozen, fields, context, None), embed)
        return grown(carry, *pull(carry.out))

    def measure(self, device: Device, row: Row, carry: Carry) -> Carry:
        """The loss of what the last stage made, where nothing is trained."""
        fields, context = device.fields(row["microbatch"])
        loss, rest = device.parts.leave(device.weights.ends, device.frozen.ends, carry.out, fields, context)
        return summed(carry, loss, *rest)


class KeptEnds(WholeEnds):
    """The ends of a model that only reads: what its head would multiply is kept, [microbatches, rows, sequence, embed].

    The last stage has it, and everybody else zeros.
    """

    def between(self, device: Device, x: jax.ShapeDtypeStruct, dtype: Any) -> jax.Array:
        """Room for all microbatches."""
        del dtype
        room = jnp.zeros((device.wiring.table.microbatches, *x.shape), x.dtype)
        return device.parts.constrain(room, KEPT)

    def metrics(self, device: Device, x: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
        """There is no loss."""
        del device, x
        return {}

    def measure(self, device: Device, row: Row, carry: Carry) -> Carry:
        """What the last stage made, behind the final norm."""
        hidden = device.parts.normed(device.weights.ends, device.frozen.ends, carry.out)
        hidden = device.parts.constrain(hidden, KEPT[1:])
        return carry._replace(between=carry.between.at[row["microbatch"]].set(hidden))
