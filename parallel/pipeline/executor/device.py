"""What a device does in a tick: F, I, W or B over the repeats of a chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from ..tables.lowering import Wiring
from ..tables.table import Op
from . import slot_pools
from .backward_split import Saved, Split
from .stage_functions import Carry, Parts, Row, Weights, when


@dataclass(frozen=True)
class Device:
    """One device's weights and microbatches, and what it does with them."""

    parts: Parts
    wiring: Wiring
    block: Split
    weights: Weights
    frozen: Weights
    batch: Any  # fields [microbatches, rows, sequence]
    keys: Any  # [microbatches, rows], or None
    ends: Any  # `ends.py` or `shared.py`: embedding, head and loss
    repeats: int  # places for repeats in a chunk

    def fields(self, microbatch: jax.Array) -> tuple[Any, Any]:
        """A microbatch's fields, and what its blocks read."""
        fields, keys = jax.tree.map(lambda leaf: leaf[microbatch], (self.batch, self.keys))
        return fields, self.parts.context(self.frozen.ends, fields, keys)

    def layer(self, row: Row, number: jax.Array) -> tuple[Any, Any]:
        """Weights and frozen weights of repeat `number` of the row's chunk."""
        place = row["chunk"] * self.repeats + number
        return jax.tree.map(lambda leaf: leaf[place], (self.weights.stacked, self.frozen.stacked))

    def forward(self, row: Row, carry: Carry) -> Carry:
        """F: run the chunk on what was sent, or on the embedding; save what the backward pass reads."""
        _, context = self.fields(row["microbatch"])

        def one(number: jax.Array, state: tuple[jax.Array, Saved]) -> tuple[jax.Array, Saved]:
            x, saved = state
            given = self.numbered(row, context, number)
            x, inputs, weight = self.block.forward(*self.layer(row, number), given, x)
            if not self.wiring.trains:
                return x, saved
            return x, saved._replace(
                input=slot_pools.put(saved.input, row["input"], number, inputs),
                weight=slot_pools.put(saved.weight, row["weight"], number, weight),
            )

        x = when(row["first"], partial(self.ends.enter, self), row, carry.messages[row["read"]])
        out, saved = jax.lax.fori_loop(0, row["repeats"], one, (x, carry.saved))
        carry = carry._replace(out=out, saved=saved)
        return carry if self.wiring.trains else when(row["last"], partial(self.ends.measure, self), row, carry)

    def input_gradient(self, row: Row, carry: Carry) -> Carry:
        """I: the gradient of the chunk's input; the stash keeps what W reads."""

        def one(step: jax.Array, state: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, list[Any]]:
            dy, stash = state
            number = row["repeats"] - 1 - step
            saved = taken(carry.saved, row, number, of=("input", "weight"))
            dx, new = self.block.input_gradient(
                *self.layer(row, number), self.numbered(row, context, number), saved, dy
            )
            return dx, slot_pools.put(stash, row["stash"], number, new)

        carry = self.begin_backward(row, carry)
        _, context = self.fields(row["microbatch"])
        out, stash = jax.lax.fori_loop(0, row["repeats"], one, (carry.out, carry.saved.stash))
        return self.end_backward(row, carry._replace(out=out, saved=carry.saved._replace(stash=stash)))

    def weight_gradient(self, row: Row, carry: Carry) -> Carry:
        """W: the gradient of the chunk's weights, added up."""
        _, context = self.fields(row["microbatch"])

        def one(number: jax.Array, gradient: Any) -> Any:
            saved = taken(carry.saved, row, number, of=("weight", "stash"))
            new = self.block.weight_gradient(*self.layer(row, number), self.numbered(row, context, number), saved)
            return self.add(gradient, row, number, new)

        stacked = jax.lax.fori_loop(0, row["repeats"], one, carry.gradient.stacked)
        return carry._replace(gradient=carry.gradient._replace(stacked=stacked))

    def backward(self, row: Row, carry: Carry) -> Carry:
        """B: I and W at once; nothing is stashed."""

        def one(step: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            dy, gradient = state
            number = row["repeats"] - 1 - step
            saved = taken(carry.saved, row, number, of=("input", "weight"))
            dx, new = self.block.backward(*self.layer(row, number), self.numbered(row, context, number), saved, dy)
            return dx, self.add(gradient, row, number, new)

        carry = self.begin_backward(row, carry)
        _, context = self.fields(row["microbatch"])
        out, stacked = jax.lax.fori_loop(0, row["repeats"], one, (carry.out, carry.gradient.stacked))
        return self.end_backward(row, carry._replace(out=out, gradient=carry.gradient._replace(stacked=stacked)))

    def begin_backward(self, row: Row, carry: Carry) -> Carry:
        """`out` is the gradient of the chunk's output: what was sent, or the loss's own on the last stage."""
        carry = carry._replace(out=carry.messages[row["read"]])
        return when(row["last"], partial(self.ends.begin_backward, self), row, carry)

    def end_backward(self, row: Row, carry: Carry) -> Carry:
        """On stage 0, hand the gradient of the input to the embedding."""
        return when(row["first"], partial(self.ends.end_backward, self), row, carry)

    def numbered(self, row: Row, context: Any, number: jax.Array) -> Any:
        """What the block of repeat `number` reads."""
        return context, row["first_repeat"] + number

    def add(self, gradient: Any, row: Row, number: jax.Array, new: Any) -> Any:
        """`gradient` with `new` added at repeat `number` of the row's chunk."""
        place = row["chunk"] * self.repeats + number
        return jax.tree.map(lambda total, part: total.at[place].add(part.astype(total.dtype)), gradient, new)


def taken(saved: Saved, row: Row, number: jax.Array, *, of: tuple[str, ...]) -> Saved:
    """What was saved for repeat `number` in the row's slots of the pools `of`; the others are left empty."""
    found = {name: slot_pools.taken(getattr(saved, name), row[name], number) for name in of}
    return Saved([], [], [])._replace(**found)


Phase = Callable[[Device, Row, Carry], Carry]
PHASES: dict[Op, Phase] = {
    Op.F: Device.forward,
    Op.I: Device.input_gradient,
    Op.W: Device.weight_gradient,
    Op.B: Device.backward,
}
