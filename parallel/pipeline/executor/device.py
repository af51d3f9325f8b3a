"""What a device does in a tick: F, I, W or B over the repeats of a chunk."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from ..tables.lowering import LoweredTable
from ..tables.table import Op
from . import slot_pools
from .backward_split import BackwardSplit, SavedValues
from .stage_functions import Carry, Row, StageFunctions, Weights, run_if


@dataclass(frozen=True)
class PipelineDevice:
    """One device's weights and microbatches, and the ops that it runs on them."""

    functions: StageFunctions
    lowered: LoweredTable
    block: BackwardSplit
    weights: Weights
    frozen: Weights
    batch: Any  # fields [microbatches, rows, sequence]
    keys: Any  # [microbatches, rows], or None
    embed_head: Any  # `ReplicatedEmbedHead` or `VocabParallelEmbedHead`: embedding, head and loss
    repeats: int  # most repeats of a chunk

    def microbatch_inputs(self, microbatch: jax.Array) -> tuple[Any, Any]:
        """A microbatch's fields, and the context that its blocks read."""
        fields, keys = jax.tree.map(lambda leaf: leaf[microbatch], (self.batch, self.keys))
        return fields, self.functions.context(self.frozen.unstacked, fields, keys)

    def block_inputs(self, row: Row, context: Any, repeat: jax.Array) -> tuple[Any, Any, Any]:
        """Weights, frozen weights and context of the block at `repeat` of the row's chunk."""
        index = row["chunk"] * self.repeats + repeat
        weights, frozen = jax.tree.map(lambda leaf: leaf[index], (self.weights.stacked, self.frozen.stacked))
        return weights, frozen, (context, row["first_repeat"] + repeat)

    def forward(self, row: Row, carry: Carry) -> Carry:
        """F: run the chunk on its message or on the embedding; save what the backward pass reads."""
        _, context = self.microbatch_inputs(row["microbatch"])

        def run_repeat(repeat: jax.Array, state: tuple[jax.Array, SavedValues]) -> tuple[jax.Array, SavedValues]:
            x, saved = state
            x, inputs, weight = self.block.forward(*self.block_inputs(row, context, repeat), x)
            if not self.lowered.trains:
                return x, saved
            return x, saved._replace(
                input=slot_pools.write_slot(saved.input, row["input"], repeat, inputs),
                weight=slot_pools.write_slot(saved.weight, row["weight"], repeat, weight),
            )

        x = run_if(row["first"], partial(self.embed_head.embed, self), row, carry.messages[row["read"]])
        output, saved = jax.lax.fori_loop(0, row["repeats"], run_repeat, (x, carry.saved))
        carry = carry._replace(output=output, saved=saved)
        if self.lowered.trains:
            return carry
        return run_if(row["last"], partial(self.embed_head.evaluate, self), row, carry)

    def input_gradient(self, row: Row, carry: Carry) -> Carry:
        """I: the gradient of the chunk's input; the stash keeps what W reads."""

        def run_repeat(step: jax.Array, state: tuple[jax.Array, list[Any]]) -> tuple[jax.Array, list[Any]]:
            dy, stash = state
            repeat = row["repeats"] - 1 - step
            saved = read_saved(carry.saved, row, repeat, pools=("input", "weight"))
            dx, new = self.block.input_gradient(*self.block_inputs(row, context, repeat), saved, dy)
            return dx, slot_pools.write_slot(stash, row["stash"], repeat, new)

        carry = self.begin_backward(row, carry)
        _, context = self.microbatch_inputs(row["microbatch"])
        output, stash = jax.lax.fori_loop(0, row["repeats"], run_repeat, (carry.output, carry.saved.stash))
        return self.end_backward(row, carry._replace(output=output, saved=carry.saved._replace(stash=stash)))

    def weight_gradient(self, row: Row, carry: Carry) -> Carry:
        """W: the gradient of the chunk's weights, added to the total."""
        _, context = self.microbatch_inputs(row["microbatch"])

        def run_repeat(repeat: jax.Array, gradient: Any) -> Any:
            saved = read_saved(carry.saved, row, repeat, pools=("weight", "stash"))
            new = self.block.weight_gradient(*self.block_inputs(row, context, repeat), saved)
            return self.add_gradient(gradient, row, repeat, new)

        stacked = jax.lax.fori_loop(0, row["repeats"], run_repeat, carry.gradient.stacked)
        return carry._replace(gradient=carry.gradient._replace(stacked=stacked))

    def backward(self, row: Row, carry: Carry) -> Carry:
        """B: I and W at once, without a stash."""

        def run_repeat(step: jax.Array, state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            dy, gradient = state
            repeat = row["repeats"] - 1 - step
            saved = read_saved(carry.saved, row, repeat, pools=("input", "weight"))
            dx, new = self.block.backward(*self.block_inputs(row, context, repeat), saved, dy)
            return dx, self.add_gradient(gradient, row, repeat, new)

        carry = self.begin_backward(row, carry)
        _, context = self.microbatch_inputs(row["microbatch"])
        output, stacked = jax.lax.fori_loop(0, row["repeats"], run_repeat, (carry.output, carry.gradient.stacked))
        return self.end_backward(row, carry._replace(output=output, gradient=carry.gradient._replace(stacked=stacked)))

    def begin_backward(self, row: Row, carry: Carry) -> Carry:
        """Set `output` to the gradient of the chunk's output: its message, on the last stage the loss's gradient."""
        carry = carry._replace(output=carry.messages[row["read"]])
        return run_if(row["last"], partial(self.embed_head.begin_backward, self), row, carry)

    def end_backward(self, row: Row, carry: Carry) -> Carry:
        """On stage 0, pass the gradient of the input to the embedding."""
        return run_if(row["first"], partial(self.embed_head.end_backward, self), row, carry)

    def add_gradient(self, gradient: Any, row: Row, repeat: jax.Array, new: Any) -> Any:
        """`gradient` with `new` added at `repeat` of the row's chunk."""
        index = row["chunk"] * self.repeats + repeat
        return jax.tree.map(lambda total, part: total.at[index].add(part.astype(total.dtype)), gradient, new)


def read_saved(saved: SavedValues, row: Row, repeat: jax.Array, *, pools: tuple[str, ...]) -> SavedValues:
    """The saved values of `repeat` in the row's slots of `pools`; the other lists are empty."""
    values = {name: slot_pools.read_slot(getattr(saved, name), row[name], repeat) for name in pools}
    return SavedValues([], [], [])._replace(**values)


OpFunction = Callable[[PipelineDevice, Row, Carry], Carry]
OP_FUNCTIONS: dict[Op, OpFunction] = {
    Op.F: PipelineDevice.forward,
    Op.I: PipelineDevice.input_gradient,
    Op.W: PipelineDevice.weight_gradient,
    Op.B: PipelineDevice.backward,
}
