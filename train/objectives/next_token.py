"""Next-token prediction, for pretrain (loss weights on all tokens) and sft (loss weights on the responses)."""

import jax

from .interface import Recipe


def next_token(token_logprobs: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """sum(weight * -log p) and sum(weight), from log p of each target [rows, sequence]."""
    weights = batch["loss_weights"]
    return -(weights * token_logprobs).sum(), weights.sum()


NEXT_TOKEN = Recipe(lambda config: next_token, unit="token")
