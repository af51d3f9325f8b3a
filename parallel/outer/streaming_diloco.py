"""Streaming DiLoCo: fragments of the model synchronize in turn, while training continues; results are mixed in later.

After update t, for the fragment whose turn it is, each replica sends its outer gradient; `overlap` updates later

    anchor <- the Nesterov step of DiLoCo along the mean outer gradient of update t
    params <- mix * params + (1 - mix) * anchor

and the other fragments are unchanged. Each fragment has an outer step every `interval` updates, at an offset of its own
from the first one. Nothing else changes a fragment's anchor between sending and receiving, so the Nesterov step is
made when sending and only the mixing is delayed: the numbers are the same, and no buffer is in flight.
Source: arXiv:2501.18512, Algorithm 2.
"""

from collections.abc import Sequence

import jax

from . import interface
from .fragment_slices import FragmentSlicer
from .fragments import fragment_offsets
from .interface import Exchange, OuterOptimizer, OuterState, OuterStep, Params


def streaming_diloco(
    exchange: Exchange,
    *,
    fragments: Sequence[FragmentSlicer],
    interval: int,
    learning_rate: float,
    momentum: float,
    overlap: int,
    mix: float,
) -> OuterOptimizer:
    """`mix` 0 drops the `overlap` updates made meanwhile; 1 would ignore the result of the outer step."""

    def send_step(fragment: FragmentSlicer):
        def send(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
            del row
            part = OuterState(fragment.extract(state.anchor), fragment.extract(state.velocity))
            gradient = exchange.mean(interface.outer_gradient(part.anchor, fragment.extract(params, 1)))
            part = interface.nesterov_step(part, gradient, learning_rate=learning_rate, momentum=momentum)
            anchor = fragment.insert(state.anchor, part.anchor)
            return params, OuterState(anchor, fragment.insert(state.velocity, part.velocity))

        return send

    def receive_step(fragment: FragmentSlicer):
        def receive(params: Params, state: OuterState, row: jax.Array) -> tuple[Params, OuterState]:
            del row
            mixed = jax.tree.map(
                lambda old, new: (mix * old.astype(new.dtype) + (1 - mix) * new).astype(old.dtype),
                fragment.extract(params, 1),
                fragment.extract(state.anchor),
            )
            return fragment.insert(params, mixed, 1), state

        return receive

    outer_steps = []
    offsets = fragment_offsets(len(fragments), interval=interval)
    for number, (fragment, offset) in enumerate(zip(fragments, offsets, strict=True)):
        send = f"send-{number}"
        outer_steps += [
            OuterStep(send, interval, offset, send_step(fragment)),
            OuterStep(f"receive-{number}", interval, offset + overlap, receive_step(fragment), depends_on=send),
        ]
    return OuterOptimizer(
        interface.initial_state,
        tuple(outer_steps),
        lambda params, state: state.anchor,
        False,
    )
