"""Streaming DiLoCo: fragments of the model meet in turn, while training goes on, and what arrives is mixed in.

After update t, for the fragment whose turn it is, each replica sends its drift; `overlap` updates later

    anchor <- the Nesterov step of DiLoCo along the mean drift of update t
    params <- mix * params + (1 - mix) * anchor

and the other fragments are left alone. Each fragment meets every `every` updates, `offset` of its own later than the
first one. Nothing else touches a fragment's anchor between the sending and the arrival, so here the outer step is made
at once and only the mixing waits: the numbers are the same, and no buffer is in flight.
Source: arXiv:2501.18512, Algorithm 2.
"""

from collections.abc import Sequence

import jax

from .fragment_slices import Cut
from .fragments import offsets
from .interface import Exchange, Meeting, OuterOptimizer, OuterState, Params, drift, float32, nesterov


def streaming(
    exchange: Exchange,
    *,
    cuts: Sequence[Cut],
    every: int,
    learning_rate: float,
    momentum: float,
    overlap: int,
    mix: float,
) -> OuterOptimizer:
    """One fragment a `cut`. `mix` 0 drops the `overlap` updates made meanwhile, 1 would ignore what arrives."""

    def sending(fragment: Cut):
        def send(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
            del row
            anchor, velocity = fragment.take(state.anchor), fragment.take(state.velocity)
            gradient = exchange.mean(drift(anchor, fragment.take(params, 1)))
            anchor, velocity = nesterov(anchor, velocity, gradient, learning_rate=learning_rate, momentum=momentum)
            return params, OuterState(fragment.put(state.anchor, anchor), fragment.put(state.velocity, velocity))

        return send

    def receiving(fragment: Cut):
        def receive(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
            del row
            own = fragment.take(params, 1)
            mixed = jax.tree.map(
                lambda old, new: (mix * old.astype(new.dtype) + (1 - mix) * new).astype(old.dtype),
                own,
                fragment.take(state.anchor),
            )
            return fragment.put(params, mixed, 1), state

        return receive

    meetings = []
    for number, (fragment, offset) in enumerate(zip(cuts, offsets(len(cuts), every=every), strict=True)):
        meetings += [
            Meeting(f"send-{number}", every, offset, sending(fragment)),
            Meeting(f"receive-{number}", every, offset + overlap, receiving(fragment), needs=f"send-{number}"),
        ]
    return OuterOptimizer(
        lambda params: OuterState(float32(params), jax.tree.map(jax.numpy.zeros_like, float32(params))),
        tuple(meetings),
        lambda params, state: state.anchor,
        False,
    )
