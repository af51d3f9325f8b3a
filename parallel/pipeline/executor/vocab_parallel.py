"""Embedding, head and loss where the vocabulary is cut over `pipe` (and `tensor`): every device works on its rows.

For a microbatch's output X [rows, sequence, embed] of the last stage, on the device that holds columns W of the head:

    S     z = X W      m = max z      s = sum exp(z - m)      P = exp(z - m) / s           its own softmax
    C1    beta = s exp(m - max m) / sum(s exp(m - max m))     turns P into its part of the whole softmax beta P
          log p(target) = z[target] - log-sum-exp, the recipe's loss, and its gradient g by each log p
    T     D = g (onehot - beta P) is the gradient by z        dW += X^T D

and dX, which the last stage waits for, is the sum over devices of D W^T: after T and a second exchange (Algorithm 1),
or, made of A = P W^T and B = W[target] during S, of g (B - beta A) in C1 itself (Algorithm 2: an exchange less, two
arrays of X's size more). g is any function of all the microbatch's log-probabilities, so any recipe will do.
Source: Balancing Pipeline Parallelism with Vocabulary Parallelism, arXiv:2411.05288, sections 4 and 5.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..tables.table import Op, Table
from ..tables.vocab_exchanges import Meetings
from .device import Device, Phase
from .stage_functions import Carry, Row, filed, grown, summed, when


@dataclass(frozen=True)
class SharedEnds:
    """The ends as one device has its rows of them."""

    meetings: Meetings
    table: Table

    def between(self, device: Device, x: jax.ShapeDtypeStruct, dtype: Any) -> dict[str, Any]:
        """What is kept between ticks, in slots: see `meetings.py`. Statistics are `dtype`."""
        slots = self.meetings.slots
        columns = device.parts.kernel(device.weights.ends, device.frozen.ends).shape[1]
        tokens, count = x.shape[:2], slots["scores"]

        def zeros(*shape: int, dtype: Any = dtype) -> jax.Array:
            return jnp.zeros(shape, dtype)

        kept = {
            "hidden": zeros(slots["hidden"], *x.shape, dtype=x.dtype),
            **{name: zeros(count, *tokens) for name in ("maximum", "total", "target")},
        }
        if not device.wiring.trains:
            return kept
        kept |= {
            "softmax": zeros(count, *tokens, columns, dtype=x.dtype),
            **{name: zeros(count, *tokens) for name in ("gradient", "share")},
            "returned": zeros(*x.shape, dtype=x.dtype),
        }
        if self.table.algorithm == 2:
            return kept | {name: zeros(count, *x.shape) for name in ("expected", "wanted")}
        return kept | {"partial": zeros(slots["partial"], *x.shape)}

    def metrics(self, device: Device, x: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
        """What recipes of log-probabilities tell besides their loss: nothing."""
        del device, x
        return {}

    def slot(self, pool: str, microbatch: jax.Array) -> jax.Array:
        """Where a microbatch's things are in a pool; the same on every device."""
        return jnp.asarray(self.meetings.slot[pool])[microbatch]

    def kept(self, carry: Carry, name: str, microbatch: jax.Array) -> jax.Array:
        """What is kept under `name` for a microbatch."""
        pool = name if name in ("hidden", "partial") else "scores"
        return carry.between[name][self.slot(pool, microbatch)]

    def keep(self, carry: Carry, microbatch: jax.Array, **new: jax.Array) -> Carry:
        """`carry` with `new` kept for a microbatch."""
        between = dict(carry.between)
        for name, array in new.items():
            pool = name if name in ("hidden", "partial") else "scores"
            between[name] = between[name].at[self.slot(pool, microbatch)].set(array.astype(between[name].dtype))
        return carry._replace(between=between)

    def columns(self, device: Device) -> tuple[jax.Array, jax.Array]:
        """The head's columns that this device holds, [embed, columns], and the number of the first."""
        kernel = device.parts.kernel(device.weights.ends, device.frozen.ends)
        return kernel, jax.lax.axis_index("pipe") * kernel.shape[1]

    def normed(self, device: Device, carry: Carry, microbatch: jax.Array) -> jax.Array:
        """What the head multiplies."""
        return device.parts.normed(device.weights.ends, device.frozen.ends, self.kept(carry, "hidden", microbatch))

    # What devices do together.

    def before(self, device: Device, row: Row, carry: Carry) -> Carry:
        """Start of a tick: the next microbatch's rows of the embedding, summed over devices, go to stage 0."""

        def rows(row: Row, messages: jax.Array) -> jax.Array:
            own = self.lookup(device, device.weights.ends, row["meet_rows"]).astype(messages.dtype)
            return filed(messages, row["rows"], jax.lax.psum(own, "pipe"))

        return carry._replace(messages=when(row["meet_rows"] >= 0, rows, row, carry.messages))

    def phases(self) -> dict[Op, Phase]:
        """S and T."""
        return {Op.S: self.scores, Op.T: self.weights}

    def after(self, device: Device, row: Row, carry: Carry) -> Carry:
        """End of a tick: the exchanges that the table has for it."""
        meet = [("broadcast", self.broadcast), ("combine", self.combine)]
        if device.wiring.trains:
            meet += [("head", self.total)] if self.table.algorithm == 1 else []
            meet += [("returned", self.scattered)]
        for kind, exchange in meet:
            carry = when(row[f"meet_{kind}"] >= 0, partial(exchange, device), row, carry)
        return carry

    def broadcast(self, device: Device, row: Row, carry: Carry) -> Carry:
        """C0: the last stage's output goes to all devices."""
        microbatch = row["meet_broadcast"]
        mine = (row["op"] == Op.F) & (row["last"] == 1)
        return self.keep(carry, microbatch, hidden=jax.lax.psum(jnp.where(mine, carry.out, 0), "pipe"))

    def combine(self, device: Device, row: Row, carry: Carry) -> Carry:
        """C1: log-probabilities and the recipe's loss; with Algorithm 2 also the gradient of the head's input."""
        microbatch = row["meet_combine"]
        maximum, total, target = (self.kept(carry, name, microbatch) for name in ("maximum", "total", "target"))
        largest = jax.lax.pmax(maximum, "pipe")
        share = total * jnp.exp(maximum - largest)
        whole, target = jax.lax.psum((share, target), "pipe")
        fields, _ = device.fields(microbatch)
        recipe = jax.value_and_grad(lambda logprobs: device.parts.recipe(logprobs, fields), has_aux=True)
        (loss, weight), gradient = recipe(target - largest - jnp.log(whole))
        once = jax.lax.axis_index("pipe") == 0
        carry = summed(carry, jnp.where(once, loss, 0), jnp.where(once, weight, 0))
        if not device.wiring.trains:
            return carry
        share = share / whole
        carry = self.keep(carry, microbatch, gradient=gradient, share=share)
        if self.table.algorithm == 1:
            return carry
        wanted, expected = (self.kept(carry, name, microbatch) for name in ("wanted", "expected"))
        d_normed = jax.lax.psum(gradient[..., None] * (wanted - share[..., None] * expected), "pipe")
        return self.sent(row, carry, d_normed)

    def total(self, device: Device, row: Row, carry: Carry) -> Carry:
        """C2 (Algorithm 1): the devices' parts of the gradient of the head's input."""
        microbatch = row["meet_head"]
        return self.sent(row, carry, jax.lax.psum(self.kept(carry, "partial", microbatch), "pipe"))

    def sent(self, row: Row, carry: Carry, d_normed: jax.Array) -> Carry:
        """`carry` with a letter for the last stage."""
        letter = d_normed.astype(carry.messages.dtype)
        return carry._replace(messages=filed(carry.messages, row["head"], letter))

    def scattered(self, device: Device, row: Row, carry: Carry) -> Carry:
        """Every device adds stage 0's gradient of the embedded tokens to its rows."""
        microbatch = row["meet_returned"]
        mine = (row["first"] == 1) & ((row["op"] == Op.I) | (row["op"] == Op.B))
        returned = jax.lax.psum(jnp.where(mine, carry.between["returned"], 0), "pipe")
        table = {"embed": {"embedding": device.weights.ends.get("embed", {}).get("embedding")}}
        if table["embed"]["embedding"] is None:
            return carry
        own, pull = jax.vjp(lambda ends: self.lookup(device, ends, microbatch), table)
        return grown(carry, *pull(returned.astype(own.dtype)))

    # What one device does.

    def scores(self, device: Device, row: Row, carry: Carry) -> Carry:
        """S: the softmax over this device's columns, and what it would pull the head's input towards."""
        microbatch = row["microbatch"]
        x = self.normed(device, carry, microbatch)
        kernel, first = self.columns(device)
        fields, _ = device.fields(microbatch)
        scores = jnp.einsum("rse,ev->rsv", x, kernel, preferred_element_type=carry.loss.dtype)
        scores = device.parts.constrain(scores, ("batch", "sequence", "vocab"))
        if device.parts.softcap is not None:
            scores = device.parts.softcap * jnp.tanh(scores / device.parts.softcap)
        column = first + jnp.arange(kernel.shape[1])
        scores = jnp.where(column < device.parts.vocab, scores, -jnp.inf)
        maximum = jnp.maximum(scores.max(axis=-1), -1e30)  # a device may hold nothing but padding
        softmax = jnp.exp(scores - maximum[..., None])
        total = softmax.sum(axis=-1)
        softmax = softmax / jnp.maximum(total, 1e-30)[..., None]
        hit = column == fields["targets"][..., None]
        target = jnp.where(hit, scores, 0).sum(axis=-1)
        carry = self.keep(carry, microbatch, maximum=maximum, total=total, target=target)
        if not device.wiring.trains:
            return carry
        carry = self.keep(carry, microbatch, softmax=softmax)
        if self.table.algorithm == 1:
            return carry
        slope = self.slope(device, softmax, maximum, total)
        pull = (softmax * slope).astype(x.dtype)
        expected = jnp.einsum("rsv,ev->rse", pull, kernel, preferred_element_type=scores.dtype)
        wanted = self.lookup_columns(device, kernel, fields["targets"] - first)
        wanted = wanted * jnp.where(hit, slope, 0).sum(axis=-1)[..., None]
        return self.keep(carry, microbatch, expected=expected, wanted=wanted)

    def weights(self, device: Device, row: Row, carry: Carry) -> Carry:
        """T: the gradient of this device's columns, and with Algorithm 1 its part of that of the head's input."""
        microbatch = row["microbatch"]
        x = self.normed(device, carry, microbatch)
        kernel, first = self.columns(device)
        fields, _ = device.fields(microbatch)
        names = ("softmax", "maximum", "total", "gradient", "share")
        softmax, maximum, total, gradient, share = (self.kept(carry, name, microbatch) for name in names)
        hit = first + jnp.arange(kernel.shape[1]) == fields["targets"][..., None]
        d_scores = gradient[..., None] * (hit - share[..., None] * softmax)
        d_scores = (d_scores * self.slope(device, softmax, maximum, total)).astype(x.dtype)
        d_scores = device.parts.constrain(d_scores, ("batch", "sequence", "vocab"))
        if self.table.algorithm == 1:
            d_normed = jnp.einsum("rsv,ev->rse", d_scores, kernel, preferred_element_type=gradient.dtype)
            carry = self.keep(carry, microbatch, partial=d_normed)
        name = "head" if "head" in device.weights.ends or "head" in device.frozen.ends else "embed"
        if name not in device.weights.ends:
            return carry
        frozen = device.frozen.ends

        def part(own: Any) -> jax.Array:
            return device.parts.kernel(device.weights.ends | {name: own}, frozen)

        _, pull = jax.vjp(part, device.weights.ends[name])
        d_kernel = jnp.einsum("rse,rsv->ev", x, d_scores)
        return grown(carry, {name: pull(d_kernel.astype(kernel.dtype))[0]})

    def slope(self, device: Device, softmax: jax.Array, maximum: jax.Array, total: jax.Array) -> jax.Array:
        """The derivative of the capped scores by the scores, read back from the softmax: 1 - (z / cap)^2."""
        cap = device.parts.softcap
        if cap is None:
            return jnp.ones((), total.dtype)
        known = jnp.maximum(softmax.astype(total.dtype) * total[..., None], 1e-30)
        return 1 - jnp.square((maximum[..., None] + jnp.log(known)) / cap)

    def lookup(self, device: Device, ends: Any, microbatch: jax.Array) -> jax.Array:
        """This device's rows of the embedding at a microbatch's tokens; zeros for those of other devices."""
        whole = device.frozen.ends.get("embed", {}) | ends.get("embed", {})
        table = whole["embedding"]
        tokens = device.batch["tokens"][microbatch] - jax.lax.axis_index("pipe") * table.shape[0]
        return masked_rows(device, table, tokens)

    def lookup_columns(self, device: Device, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        """The head's columns of the targets, as rows [rows, sequence, embed]; zeros where it has them not."""
        return masked_rows(device, kernel.T, targets)

    # The two ends of the model.

    def enter(self, device: Device, row: Row, sent: jax.Array) -> jax.Array:
        """The first block's input, of the rows that were sent."""
        fields, context = device.fields(row["microbatch"])
        ends, frozen = device.weights.ends, device.frozen.ends
        return device.parts.enter(ends, frozen, fields, context, lambda table, tokens: sent)

    def begin_backward(self, device: Device, row: Row, carry: Carry) -> Carry:
        """`out`, the gradient of the head's input, becomes that of the last stage's output."""
        hidden, frozen = self.kept(carry, "hidden", row["microbatch"]), device.frozen.ends
        own = {name: value for name, value in device.weights.ends.items() if name == "final_norm"}
        _, pull = jax.vjp(lambda own, x: device.parts.normed(device.weights.ends | own, frozen, x), own, hidden)
        d_norm, d_hidden = pull(carry.out)
        return grown(carry._replace(out=d_hidden), d_norm)

    def end_backward(self, device: Device, row: Row, carry: Carry) -> Carry:
        """The gradient of the rows that were sent, kept for the exchange, and of whatever else the embedding has."""
        fields, context = device.fields(row["microbatch"])
        ends, frozen = device.weights.ends, device.frozen.ends
        rest = {name: value for name, value in ends.get("embed", {}).items() if name != "embedding"}

        def entered(rest: Any, rows: jax.Array) -> jax.Array:
            own = ends | ({"embed": ends["embed"] | rest} if rest else {})
            return device.parts.enter(own, frozen, fields, context, lambda table, tokens: rows)

        _, pull = jax.vjp(entered, rest, jnp.zeros_like(carry.out))
        d_rest, d_rows = pull(carry.out)
        carry = grown(carry, {"embed": d_rest}) if rest else carry
        return carry._replace(between=carry.between | {"returned": d_rows})

    def measure(self, device: Device, row: Row, carry: Carry) -> Carry:
        """Nothing: the loss is made where the devices meet."""
        del device, row
        return carry


def masked_rows(device: Device, table: jax.Array, places: jax.Array) -> jax.Array:
    """Rows of `table` at `places` [rows, sequence], zeros for places that it has not."""
    inside = (places >= 0) & (places < table.shape[0])
    found = device.parts.lookup(table, jnp.where(inside, places, 0))
    return jnp.where(inside[..., None], found, 0)
