"""Prompt tuning and P-tuning: learned virtual tokens in front of every document.

    prompt:    the rows themselves are learned                                          arXiv:2104.08691
    p-tuning:  rows = W3 relu(W2 relu(W1 seeds + b1) + b2) + b3, all of it learned      arXiv:2103.10385

What a causal model makes of a prompt does not depend on what follows. So the prompt passes through the blocks once, by
itself, and what it leaves is a prefix of keys and values (`Decoder.prefix`) that all documents of a batch see.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..decoder import Params
from .interface import AddedModule, Leaves


class PromptEmbedding(nnx.Module):
    """The rows [length, embed] of virtual tokens."""

    def __init__(self, leaves: Leaves):
        self.rows = nnx.Param(leaves["rows"])

    def __call__(self) -> jax.Array:
        """The rows."""
        return self.rows[...]


class PromptEncoder(nnx.Module):
    """Rows [length, embed] that a perceptron makes of seeds."""

    def __init__(self, leaves: Leaves):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))

    def __call__(self) -> jax.Array:
        """The rows."""
        first = jax.nn.relu(self.seeds[...] @ self.w1[...] + self.b1[...])
        return jax.nn.relu(first @ self.w2[...] + self.b2[...]) @ self.w3[...] + self.b3[...]


def sample_embeddings(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> jax.Array:
    """The table's rows [length, embed] of tokens drawn at random, float32: where prompts start best."""
    tokens = jax.random.randint(key, (adapter.length,), 0, model.vocab)
    return jnp.take(weights["embed"]["embedding"], tokens, axis=0).astype(jnp.float32)


def init_prompt(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """A prompt of real tokens."""
    return {"prompt": {"rows": sample_embeddings(weights, model, adapter, key)}}


def init_prompt_encoder(
    weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array
) -> dict[str, Leaves]:
    """Seeds of deviation 1; maps and biases as PEFT draws them, uniform within 1 / sqrt(inputs)."""
    del weights
    width, bound = model.embed, model.embed**-0.5
    keys = jax.random.split(key, 7)
    leaves = {"seeds": jax.random.normal(keys[0], (adapter.length, width))}
    for number in (1, 2, 3):
        for key, name, shape in ((keys[number], "w", (width, width)), (keys[3 + number], "b", (width,))):
            leaves[f"{name}{number}"] = jax.random.uniform(key, shape, jnp.float32, -bound, bound)
    return {"prompt": leaves}


PROMPT = AddedModule(init_prompt, PromptEmbedding, trained_suffixes=("/prompt/rows",), is_prefix=True)
ENCODER_LEAVES = ("seeds", "w1", "b1", "w2", "b2", "w3", "b3")
P_TUNING = AddedModule(
    init_prompt_encoder,
    PromptEncoder,
    trained_suffixes=tuple(f"/prompt/{name}" for name in ENCODER_LEAVES),
    is_prefix=True,
)
