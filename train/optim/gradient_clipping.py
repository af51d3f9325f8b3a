"""Gradients clipped by their global norm, as a part of the chain of an optimizer; and not clipped."""

import optax


def clip_gradients(limit: float) -> optax.GradientTransformation:
    """Scale all gradients down so that their global norm, over the whole model, is at most `limit`."""
    return optax.clip_by_global_norm(limit)


def no_clipping(limit: float) -> optax.GradientTransformation:
    """No clipping, with the same state as clipping has: as if no norm ever reached `limit`."""
    del limit
    return optax.identity()
