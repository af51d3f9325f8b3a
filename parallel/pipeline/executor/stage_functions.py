"""What the engine is given, what it carries from tick to tick, and the loop that stands for a branch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .backward_split import Saved

BATCH_AXES = ("data", "fsdp")
MANUAL = {"pipe", *BATCH_AXES}  # the mesh axes that the engine's shard_map takes
RESIDUAL = ("batch", "block_sequence", None)  # dimensions of what passes between stages
Row = dict[str, jax.Array]  # a device's row of the table: field -> number


class Weights(NamedTuple):
    """Parameters as a pipeline cuts them; each a nested dict."""

    stacked: Any  # of the blocks, [pipe * chunks * repeats, ...]
    ends: Any  # of everything else: embedding, final norm, head


@dataclass(frozen=True)
class Parts:
    """The model as a pipeline cuts it. `fields` are a microbatch's, `context` is made of them; `frozen`: only read."""

    context: Callable[..., Any]  # frozen ends, fields, dropout keys -> arrays that a microbatch's blocks read
    block: Callable[..., jax.Array]  # weights, frozen, (context, repeat), x -> x
    enter: Callable[..., jax.Array]  # ends, frozen, fields, context, lookup (None: the model's) -> x of the first block
    leave: Callable[..., Any]  # ends, frozen, hidden, fields, context -> numerator, (weight, metrics): sums
    normed: Callable[..., jax.Array]  # ends, frozen, hidden -> what the head multiplies
    kernel: Callable[..., jax.Array]  # ends, frozen -> the head's [embed, rows of the vocabulary]
    recipe: Callable[..., tuple[jax.Array, jax.Array]]  # log-probabilities of the targets, fields -> numerator, weight
    shape: Callable[[Any], jax.ShapeDtypeStruct]  # fields -> shape of x
    constrain: Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
    lookup: Callable[[jax.Array, jax.Array], jax.Array]  # table, places -> rows
    vocab: int
    softcap: float | None


class Carry(NamedTuple):
    """What a tick hands to the next, on one device."""

    out: jax.Array  # x or its gradient, as made in this tick
    messages: jax.Array  # [slots + 1, rows, sequence, embed], the last one for letters that nobody reads
    saved: Saved  # each [slots, repeats, ...], on the device or in host memory (`pools.py`)
    gradient: Weights
    loss: jax.Array
    weight: jax.Array
    metrics: dict[str, jax.Array]  # further sums
    between: Any  # what vocabulary passes keep; () without them


def when(active: jax.Array, body: Callable[[Row, Any], Any], row: Row, carry: Any) -> Any:
    """`body(row, carry)` where `active`, else `carry`: a loop of one or no rounds, whose carry is updated in place.

    The body's `row` is tied to the round. What a loop does with numbers from outside is the same in each of its rounds,
    so the compiler would move it out of the loop, and a device that has nothing to do would do it in every tick.
    """

    def once(number: jax.Array, carry: Any) -> Any:
        return body(jax.lax.optimization_barrier((row, number))[0], carry)

    return jax.lax.fori_loop(0, active.astype(jnp.int32), once, carry)


def undivided(active: jax.Array, body: Callable[[Row, Any], Any], row: Row, carry: Any) -> Any:
    """`when`, of which nothing leaves before all of it is done.

    W changes nothing that is passed on, so a compiler may pass it on first: then the device waits for its neighbours'
    ops with its own still to do, and the tick takes as long as both.
    """
    return when(active, lambda row, carry: jax.lax.optimization_barrier(body(row, carry)), row, carry)


def added(total: Any, new: Any) -> Any:
    """Leaf by leaf, in the dtype of `total`; what `new` lacks stays as it is."""
    if isinstance(total, dict):
        return total | {name: added(total[name], part) for name, part in new.items()}
    return total + new.astype(total.dtype)


def summed(carry: Carry, loss: jax.Array, weight: jax.Array, metrics: dict[str, jax.Array] | None = None) -> Carry:
    """`carry` with a microbatch's loss, weight and metrics added."""
    return carry._replace(
        loss=carry.loss + loss.astype(carry.loss.dtype),
        weight=carry.weight + weight.astype(carry.weight.dtype),
        metrics=added(carry.metrics, metrics or {}),
    )


def grown(carry: Carry, ends: Any) -> Carry:
    """`carry` with `ends` added to the gradient of the ends."""
    return carry._replace(gradient=carry.gradient._replace(ends=added(carry.gradient.ends, ends)))


def filed(messages: jax.Array, slot: jax.Array, letter: jax.Array) -> jax.Array:
    """`messages` with `letter` in `slot`; -1, the last one, is for letters that nobody reads."""
    return messages.at[slot].set(letter)
