"""Prompt tuning and P-tuning: learned virtual tokens that precede every document.

    prompt:    the rows themselves are learned                                          arXiv:2104.08691
    p-tuning:  rows = W3 relu(W2 relu(W1 seeds + b1) + b2) + b3, all of it learned      arXiv:2103.10385

In a causal model the prompt's keys and values do not depend on the tokens that follow. So the prompt passes through the
blocks once, by itself, and all documents of a batch see its keys and values as a prefix (`Decoder.prefix`).
"""

import jax
import jax.numpy as jnp

from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..decoder import Params
from .interface import AddedModule, LeafModule, Leaves


class PromptEmbedding(LeafModule):
    """The embeddings [length, embed] of the virtual tokens."""

    def __call__(self) -> jax.Array:
        """The embeddings [length, embed]."""
        return self.rows[...]


class PromptEncoder(LeafModule):
    """A perceptron that computes the embeddings [length, embed] of the virtual tokens from seeds."""

    def __call__(self) -> jax.Array:
        """The embeddings [length, embed]."""
        hidden = jax.nn.relu(self.seeds[...] @ self.w1[...] + self.b1[...])
        return jax.nn.relu(hidden @ self.w2[...] + self.b2[...]) @ self.w3[...] + self.b3[...]


def sample_embeddings(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> jax.Array:
    """Embeddings [length, embed] float32 of tokens drawn at random: the best start for prompts."""
    tokens = jax.random.randint(key, (adapter.length,), 0, model.vocab)
    return jnp.take(weights["embed"]["embedding"], tokens, axis=0).astype(jnp.float32)


def init_prompt(weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array) -> dict[str, Leaves]:
    """A prompt of real tokens."""
    return {"prompt": {"rows": sample_embeddings(weights, model, adapter, key)}}


def init_prompt_encoder(
    weights: Params, model: ModelConfig, adapter: AdapterConfig, key: jax.Array
) -> dict[str, Leaves]:
    """Seeds of deviation 1; weights and biases uniform within 1 / sqrt(inputs), as PEFT draws them."""
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
