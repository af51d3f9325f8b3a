"""How large a model is and how much arithmetic a token costs it, from its settings alone. Imports no JAX.

    FLOPs a token, forward and backward = 6 N + 12 heads head_dim keys, the second term summed over layers

N counts the weights of matrix products: the head, also a tied one, but neither embedding lookup nor norms and biases.
`keys` is how many keys a query sees on average: half the sequence, less under a window. Recomputation is not counted,
so that utilisation falls when memory is bought with time. Source: PaLM, arXiv:2204.02311, appendix B.
"""

from ..configs.sections.model import ModelConfig


def flops_per_token(model: ModelConfig, sequence_length: int, *, frozen: bool = False) -> float:
    """FLOPs of a token in a forward and backward pass, in documents of `sequence_length` tokens.

    `frozen`: the weights have no gradient, and what is trained beside them is small: 4 N in place of 6 N.
    """
    width = model.heads * model.head_width
    kinds = (model.windows[layer % len(model.windows)] for layer in range(model.layers))
    keys = sum(visible_keys(sequence_length, window=window) for window in kinds)
    # Forward: q k^T and p v, each a multiplication and an addition a key; backward: twice the forward.
    return (4 if frozen else 6) * matmul_parameters(model) + 3 * 2 * 2 * width * keys


def visible_keys(sequence_length: int, *, window: int | None) -> float:
    """Keys a query sees on average in a document of `sequence_length` tokens, itself included.

    >>> visible_keys(4, window=None), visible_keys(4, window=2)
    (2.5, 1.75)
    """
    full = min(window or sequence_length, sequence_length)
    pairs = full * (full + 1) / 2 + (sequence_length - full) * full
    return pairs / sequence_length


def matmul_parameters(model: ModelConfig) -> int:
    """Weights that multiply every token: attention and MLP of all layers, and the head."""
    attention = model.embed * model.head_width * (2 * model.heads + 2 * model.key_value_heads)
    mlp = model.embed * model.mlp * (2 if model.activation == "gelu" else 3)
    return model.layers * (attention + mlp) + model.embed * model.vocab


def parameter_count(model: ModelConfig) -> int:
    """All weights, without the padding of the vocabulary; a tied head counts once."""
    embedding = 0 if model.tied_embeddings else model.embed * model.vocab
    if model.position_encoding == "learned":
        embedding += model.embed * model.max_positions
    norm = model.embed * (2 if model.norm == "layer" else 1)
    norms = ((1 if model.parallel_block else 2) if model.pre_norms else 0) + (2 if model.post_norms else 0)
    heads = model.heads + model.key_value_heads if model.qk_norm_whole else 2
    layer = norms * norm + _biases(model) + (heads * model.head_width if model.qk_norm else 0)
    return matmul_parameters(model) + embedding + model.layers * layer + norm


def _biases(model: ModelConfig) -> int:
    """Biases of one layer."""
    attention = model.head_width * (model.heads + 2 * model.key_value_heads) if model.qkv_bias else 0
    wide = model.mlp * (1 if model.activation == "gelu" else 2)
    return attention + (2 * model.embed + wide if model.linear_bias else 0)
