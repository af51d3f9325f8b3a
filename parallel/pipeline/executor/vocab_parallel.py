"""Embedding, head and loss with the vocabulary sharded over `pipe` (and `tensor`): every device works on its rows.

For a microbatch's output X [rows, sequence, embed] of the last stage, on the device that holds columns W of the head:

    S     z = X W      m = max z      s = sum exp(z - m)      P = exp(z - m) / s           the softmax of the shard
    C1    beta = s exp(m - max m) / sum(s exp(m - max m))     beta P is the shard's part of the whole softmax
          log p(target) = z[target] - log-sum-exp, the recipe's loss, and its gradient g by each log p
    T     D = g (onehot - beta P) is the gradient by z        dW += X^T D

and dX, which the last stage waits for, is the sum over devices of D W^T: after T and a second exchange (Algorithm 1),
or, made of A = P W^T and B = W[target] during S, of g (B - beta A) in C1 itself (Algorithm 2: one exchange less, two
arrays of X's size more). g is any function of all the microbatch's log-probabilities, so any recipe works.
Source: Balancing Pipeline Parallelism with Vocabulary Parallelism, arXiv:2411.05288, sections 4 and 5.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..tables.table import Op, Table
from ..tables.vocab_exchanges import VocabExchanges
from .device import OpFunction, PipelineDevice
from .stage_functions import Carry, Row, add_sums, add_unstacked_gradient, run_if, store_message


@dataclass(frozen=True)
class VocabParallelEmbedHead:
    """Embedding, head and loss with the vocabulary sharded; the interface is that of `ReplicatedEmbedHead`."""

    exchanges: VocabExchanges
    table: Table

    def initial_state(self, device: PipelineDevice, x: jax.ShapeDtypeStruct, dtype: Any) -> dict[str, Any]:
        """Zeros in the pools of `vocab_exchanges.py` and the array `embed_gradient`. Statistics are `dtype`."""
        slots = self.exchanges.slots
        columns = device.functions.head_kernel(device.weights.unstacked, device.frozen.unstacked).shape[1]
        tokens, count = x.shape[:2], slots["scores"]

        def zeros(*shape: int, dtype: Any = dtype) -> jax.Array:
            return jnp.zeros(shape, dtype)

        state = {
            "hidden": zeros(slots["hidden"], *x.shape, dtype=x.dtype),
            **{name: zeros(count, *tokens) for name in ("maximum", "total", "target")},
        }
        if not device.lowered.trains:
            return state
        state |= {
            "softmax": zeros(count, *tokens, columns, dtype=x.dtype),
            **{name: zeros(count, *tokens) for name in ("gradient", "share")},
            "embed_gradient": zeros(*x.shape, dtype=x.dtype),
        }
        if self.table.algorithm == 2:
            return state | {name: zeros(count, *x.shape) for name in ("expected_column", "target_column")}
        return state | {"partial": zeros(slots["partial"], *x.shape)}

    def metrics(self, device: PipelineDevice, x: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
        """None: recipes of log-probabilities have no sums besides the loss."""
        del device, x
        return {}

    def slot(self, name: str, microbatch: jax.Array) -> jax.Array:
        """A microbatch's slot in the array `name` of the state; the same on every device."""
        pool = name if name in ("hidden", "partial") else "scores"
        return jnp.asarray(self.exchanges.slot[pool])[microbatch]

    def load(self, carry: Carry, name: str, microbatch: jax.Array) -> jax.Array:
        """A microbatch's value in the array `name` of the state."""
        return carry.head_state[name][self.slot(name, microbatch)]

    def store(self, carry: Carry, microbatch: jax.Array, **values: jax.Array) -> Carry:
        """`carry` with a microbatch's `values` in the state."""
        state = dict(carry.head_state)
        for name, value in values.items():
            state[name] = state[name].at[self.slot(name, microbatch)].set(value.astype(state[name].dtype))
        return carry._replace(head_state=state)

    def kernel_shard(self, device: PipelineDevice) -> tuple[jax.Array, jax.Array]:
        """This device's columns of the head, [embed, columns], and the number of the first one."""
        kernel = device.functions.head_kernel(device.weights.unstacked, device.frozen.unstacked)
        return kernel, jax.lax.axis_index("pipe") * kernel.shape[1]

    def head_input(self, device: PipelineDevice, carry: Carry, microbatch: jax.Array) -> jax.Array:
        """The last stage's output after the final norm."""
        hidden = self.load(carry, "hidden", microbatch)
        return device.functions.final_norm(device.weights.unstacked, device.frozen.unstacked, hidden)

    # Exchanges between devices.

    def before_tick(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Start of a tick: send the next microbatch's embedding, summed over devices, to stage 0."""

        def exchange(row: Row, messages: jax.Array) -> jax.Array:
            rows = self.embed_rows(device, device.weights.unstacked, row["exchange_embed"]).astype(messages.dtype)
            return store_message(messages, row["embed"], jax.lax.psum(rows, "pipe"))

        return carry._replace(messages=run_if(row["exchange_embed"] >= 0, exchange, row, carry.messages))

    def op_functions(self) -> dict[Op, OpFunction]:
        """S and T."""
        return {Op.S: self.run_s, Op.T: self.run_t}

    def after_tick(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """End of a tick: run the exchanges that the table has for it."""
        exchanges = [("broadcast", self.broadcast), ("combine", self.add_loss_from_shards)]
        if device.lowered.trains:
            exchanges += [("head_gradient", self.reduce_head_gradient)] if self.table.algorithm == 1 else []
            exchanges += [("embed_gradient", self.broadcast_embed_gradient)]
        for kind, exchange in exchanges:
            carry = run_if(row[f"exchange_{kind}"] >= 0, partial(exchange, device), row, carry)
        return carry

    def broadcast(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """C0: send the last stage's output to all devices."""
        microbatch = row["exchange_broadcast"]
        is_source = (row["op"] == Op.F) & (row["last"] == 1)
        return self.store(carry, microbatch, hidden=jax.lax.psum(jnp.where(is_source, carry.output, 0), "pipe"))

    def add_loss_from_shards(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """C1: log-probabilities and the recipe's loss; with Algorithm 2 also the gradient of the head's input."""
        microbatch = row["exchange_combine"]
        maximum, total, target = (self.load(carry, name, microbatch) for name in ("maximum", "total", "target"))
        largest = jax.lax.pmax(maximum, "pipe")
        share = total * jnp.exp(maximum - largest)
        denominator, target = jax.lax.psum((share, target), "pipe")
        fields, _ = device.microbatch_inputs(microbatch)
        recipe = jax.value_and_grad(lambda logprobs: device.functions.recipe(logprobs, fields), has_aux=True)
        (loss, weight), gradient = recipe(target - largest - jnp.log(denominator))
        is_first = jax.lax.axis_index("pipe") == 0  # all devices have the loss; it counts once
        carry = add_sums(carry, jnp.where(is_first, loss, 0), jnp.where(is_first, weight, 0))
        if not device.lowered.trains:
            return carry
        share = share / denominator
        carry = self.store(carry, microbatch, gradient=gradient, share=share)
        if self.table.algorithm == 1:
            return carry
        target_column, expected = (self.load(carry, name, microbatch) for name in ("target_column", "expected_column"))
        d_normed = gradient[..., None] * (target_column - share[..., None] * expected)
        return self.send_head_gradient(row, carry, d_normed)

    def reduce_head_gradient(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """C2 (Algorithm 1): sum the devices' parts of the gradient of the head's input."""
        return self.send_head_gradient(row, carry, self.load(carry, "partial", row["exchange_head_gradient"]))

    def send_head_gradient(self, row: Row, carry: Carry, partial_gradient: jax.Array) -> Carry:
        """`carry` with the sum over devices as a message to the last stage."""
        message = jax.lax.psum(partial_gradient, "pipe").astype(carry.messages.dtype)
        return carry._replace(messages=store_message(carry.messages, row["head_gradient"], message))

    def broadcast_embed_gradient(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Send stage 0's gradient of the embedded tokens to all devices, which add it to their rows."""
        microbatch = row["exchange_embed_gradient"]
        is_source = (row["first"] == 1) & ((row["op"] == Op.I) | (row["op"] == Op.B))
        d_rows = jax.lax.psum(jnp.where(is_source, carry.head_state["embed_gradient"], 0), "pipe")
        table = {"embed": {"embedding": device.weights.unstacked.get("embed", {}).get("embedding")}}
        if table["embed"]["embedding"] is None:
            return carry
        rows, pull = jax.vjp(lambda unstacked: self.embed_rows(device, unstacked, microbatch), table)
        return add_unstacked_gradient(carry, *pull(d_rows.astype(rows.dtype)))

    # Ops of one device.

    def run_s(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """S: the softmax over this device's columns, and with Algorithm 2 A and B of the module's docstring."""
        microbatch = row["microbatch"]
        x = self.head_input(device, carry, microbatch)
        kernel, first = self.kernel_shard(device)
        fields, _ = device.microbatch_inputs(microbatch)
        logits = jnp.einsum("rse,ev->rsv", x, kernel, preferred_element_type=carry.loss.dtype)
        logits = device.functions.constrain(logits, ("batch", "sequence", "vocab"))
        if device.functions.softcap is not None:
            logits = device.functions.softcap * jnp.tanh(logits / device.functions.softcap)
        column = first + jnp.arange(kernel.shape[1])
        logits = jnp.where(column < device.functions.vocab, logits, -jnp.inf)
        maximum = jnp.maximum(logits.max(axis=-1), -1e30)  # a device may hold nothing but padding
        softmax = jnp.exp(logits - maximum[..., None])
        total = softmax.sum(axis=-1)
        softmax = softmax / jnp.maximum(total, 1e-30)[..., None]
        is_target = column == fields["targets"][..., None]
        target = jnp.where(is_target, logits, 0).sum(axis=-1)
        carry = self.store(carry, microbatch, maximum=maximum, total=total, target=target)
        if not device.lowered.trains:
            return carry
        carry = self.store(carry, microbatch, softmax=softmax)
        if self.table.algorithm == 1:
            return carry
        slope = self.softcap_slope(device, softmax, maximum, total)
        weighted = (softmax * slope).astype(x.dtype)
        expected = jnp.einsum("rsv,ev->rse", weighted, kernel, preferred_element_type=logits.dtype)
        target_column = masked_rows(device, kernel.T, fields["targets"] - first)
        target_column = target_column * jnp.where(is_target, slope, 0).sum(axis=-1)[..., None]
        return self.store(carry, microbatch, expected_column=expected, target_column=target_column)

    def run_t(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """T: the gradient of this device's columns; with Algorithm 1 also its part of that of the head's input."""
        microbatch = row["microbatch"]
        x = self.head_input(device, carry, microbatch)
        kernel, first = self.kernel_shard(device)
        fields, _ = device.microbatch_inputs(microbatch)
        names = ("softmax", "maximum", "total", "gradient", "share")
        softmax, maximum, total, gradient, share = (self.load(carry, name, microbatch) for name in names)
        is_target = first + jnp.arange(kernel.shape[1]) == fields["targets"][..., None]
        d_logits = gradient[..., None] * (is_target - share[..., None] * softmax)
        d_logits = (d_logits * self.softcap_slope(device, softmax, maximum, total)).astype(x.dtype)
        d_logits = device.functions.constrain(d_logits, ("batch", "sequence", "vocab"))
        if self.table.algorithm == 1:
            d_normed = jnp.einsum("rsv,ev->rse", d_logits, kernel, preferred_element_type=gradient.dtype)
            carry = self.store(carry, microbatch, partial=d_normed)
        unstacked, frozen = device.weights.unstacked, device.frozen.unstacked
        owner = "head" if "head" in unstacked or "head" in frozen else "embed"
        if owner not in unstacked:
            return carry
        _, pull = jax.vjp(
            lambda weights: device.functions.head_kernel(unstacked | {owner: weights}, frozen), unstacked[owner]
        )
        d_kernel = jnp.einsum("rse,rsv->ev", x, d_logits)
        return add_unstacked_gradient(carry, {owner: pull(d_kernel.astype(kernel.dtype))[0]})

    def softcap_slope(
        self, device: PipelineDevice, softmax: jax.Array, maximum: jax.Array, total: jax.Array
    ) -> jax.Array:
        """The derivative of capped by uncapped logits, computed back from the softmax: 1 - (z / cap)^2."""
        cap = device.functions.softcap
        if cap is None:
            return jnp.ones((), total.dtype)
        exponentials = jnp.maximum(softmax.astype(total.dtype) * total[..., None], 1e-30)
        return 1 - jnp.square((maximum[..., None] + jnp.log(exponentials)) / cap)

    def embed_rows(self, device: PipelineDevice, unstacked: Any, microbatch: jax.Array) -> jax.Array:
        """This device's rows of the embedding at a microbatch's tokens; zeros for tokens of other devices."""
        table = (device.frozen.unstacked.get("embed", {}) | unstacked.get("embed", {}))["embedding"]
        tokens = device.batch["tokens"][microbatch] - jax.lax.axis_index("pipe") * table.shape[0]
        return masked_rows(device, table, tokens)

    # The embedding on stage 0, and the norm on the last stage.

    def embed(self, device: PipelineDevice, row: Row, message: jax.Array) -> jax.Array:
        """The first block's input, from the rows in `message`."""
        fields, context = device.microbatch_inputs(row["microbatch"])
        unstacked, frozen = device.weights.unstacked, device.frozen.unstacked
        return device.functions.embed(unstacked, frozen, fields, context, lambda table, tokens: message)

    def begin_backward(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Turn `output`, the gradient of the head's input, into that of the last stage's output."""
        hidden, frozen = self.load(carry, "hidden", row["microbatch"]), device.frozen.unstacked
        unstacked = device.weights.unstacked
        norm = {name: value for name, value in unstacked.items() if name == "final_norm"}
        _, pull = jax.vjp(lambda norm, x: device.functions.final_norm(unstacked | norm, frozen, x), norm, hidden)
        d_norm, d_hidden = pull(carry.output)
        return add_unstacked_gradient(carry._replace(output=d_hidden), d_norm)

    def end_backward(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Keep the gradient of the rows for its exchange; add that of the embedding's other weights."""
        fields, context = device.microbatch_inputs(row["microbatch"])
        unstacked, frozen = device.weights.unstacked, device.frozen.unstacked
        extra = {name: value for name, value in unstacked.get("embed", {}).items() if name != "embedding"}

        def embed(extra: Any, rows: jax.Array) -> jax.Array:
            weights = unstacked | ({"embed": unstacked["embed"] | extra} if extra else {})
            return device.functions.embed(weights, frozen, fields, context, lambda table, tokens: rows)

        _, pull = jax.vjp(embed, extra, jnp.zeros_like(carry.output))
        d_other, d_rows = pull(carry.output)
        carry = add_unstacked_gradient(carry, {"embed": d_other}) if extra else carry
        return carry._replace(head_state=carry.head_state | {"embed_gradient": d_rows})

    def evaluate(self, device: PipelineDevice, row: Row, carry: Carry) -> Carry:
        """Nothing: `add_loss_from_shards` adds the loss."""
        del device, row
        return carry


def masked_rows(device: PipelineDevice, table: jax.Array, indices: jax.Array) -> jax.Array:
    """Rows of `table` at `indices` [rows, sequence]; zeros for indices outside of it."""
    inside = (indices >= 0) & (indices < table.shape[0])
    rows = device.functions.lookup(table, jnp.where(inside, indices, 0))
    return jnp.where(inside[..., None], rows, 0)
