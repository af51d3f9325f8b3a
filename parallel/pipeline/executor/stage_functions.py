"""The model as functions of a stage, the state that ticks hand on, and the loop that replaces a branch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .backward_split import SavedValues

BATCH_AXES = ("data", "fsdp")
MANUAL_AXES = {"pipe", *BATCH_AXES}  # the manual mesh axes of the executor's shard_map
HIDDEN_DIMENSIONS = ("batch", "block_sequence", None)  # of what passes between stages
Row = dict[str, jax.Array]  # a device's row of the lowered table: field -> int32 scalar


class Weights(NamedTuple):
    """Parameters as a pipeline splits them; each a nested dict."""

    stacked: Any  # those of the blocks, [pipe * chunks * repeats, ...]
    unstacked: Any  # all others: embedding, final norm, head


@dataclass(frozen=True)
class StageFunctions:
    """The model in pure functions. `fields` are a microbatch's, `context` is made of them; `frozen` has no gradient."""

    context: Callable[..., Any]  # frozen.unstacked, fields, dropout keys -> arrays that a microbatch's blocks read
    block: Callable[..., jax.Array]  # weights, frozen, (context, repeat), x -> x
    embed: Callable[..., jax.Array]  # unstacked, frozen, fields, context, lookup (None: the model's) -> x of stage 0
    loss_head: Callable[..., Any]  # unstacked, frozen, hidden, fields, context -> numerator, (weight, metrics): sums
    final_norm: Callable[..., jax.Array]  # unstacked, frozen, hidden -> what the head multiplies
    head_kernel: Callable[..., jax.Array]  # unstacked, frozen -> the head's [embed, rows of the vocabulary]
    recipe: Callable[..., tuple[jax.Array, jax.Array]]  # log-probabilities of the targets, fields -> numerator, weight
    hidden_shape: Callable[[Any], jax.ShapeDtypeStruct]  # fields -> shape of x
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
    lookup: Callable[[jax.Array, jax.Array], jax.Array]  # table, indices -> rows
    vocab: int
    softcap: float | None


class Carry(NamedTuple):
    """The state that a tick hands to the next, on one device."""

    output: jax.Array  # x or its gradient, as made in this tick
    messages: jax.Array  # [slots + 1, rows, sequence, embed]; the last slot is for messages that no op reads
    saved: SavedValues  # each [slots, repeats, ...], on the device or in host memory (`slot_pools.py`)
    gradient: Weights
    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]  # further sums
    head_state: Any  # what embedding and head keep between ticks (`embed_head.py`, `vocab_parallel.py`)


def run_if(active: jax.Array, body: Callable[[Row, Any], Any], row: Row, carry: Any) -> Any:
    """`body(row, carry)` if `active`, else `carry`: a loop of one or no rounds, whose carry is updated in place.

    The body's `row` is tied to the round. A loop does the same with outside values in each of its rounds, so the
    compiler would move that work out of the loop, and a device with nothing to do would do it in every tick.
    """

    def run_once(number: jax.Array, carry: Any) -> Any:
        return body(jax.lax.optimization_barrier((row, number))[0], carry)

    return jax.lax.fori_loop(0, active.astype(jnp.int32), run_once, carry)


def run_if_with_barrier(active: jax.Array, body: Callable[[Row, Any], Any], row: Row, carry: Any) -> Any:
    """`run_if` with a barrier: none of its results is used before all of them are done.

    W changes nothing that is sent, so a compiler may send first: then the device waits for its neighbours' ops with its
    own still to do, and the tick takes as long as both.
    """
    return run_if(active, lambda row, carry: jax.lax.optimization_barrier(body(row, carry)), row, carry)


def add_trees(total: Any, new: Any) -> Any:
    """The sum leaf by leaf, in the dtype of `total`; what `new` lacks is unchanged."""
    if isinstance(total, dict):
        return total | {name: add_trees(total[name], part) for name, part in new.items()}
    return total + new.astype(total.dtype)


def add_sums(carry: Carry, loss: jax.Array, weight: jax.Array, metrics: dict[str, jax.Array] | None = None) -> Carry:
    """`carry` with a microbatch's loss, weight and metrics added."""
    return carry._replace(
        loss=carry.loss + loss.astype(carry.loss.dtype),
        weight=carry.weight + weight.astype(carry.weight.dtype),
        metrics=add_trees(carry.metrics, metrics or {}),
    )


def add_unstacked_gradient(carry: Carry, gradient: Any) -> Carry:
    """`carry` with `gradient` added to that of the unstacked weights."""
    total = carry.gradient
    return carry._replace(gradient=total._replace(unstacked=add_trees(total.unstacked, gradient)))


def store_message(messages: jax.Array, slot: jax.Array, message: jax.Array) -> jax.Array:
    """`messages` with `message` in `slot`; slot -1, the last one, is for messages that no op reads."""
    return messages.at[slot].set(message)
