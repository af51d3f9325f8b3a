"""Pretraining: the next token of every document."""

import jax


def next_token(token_logprobs: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """sum(weight * -log p) and sum(weight), from log p of each target [rows, sequence]."""
    weights = batch["loss_weights"]
    return -(weights * token_logprobs).sum(), weights.sum()
