"""Parameters and model FLOPs of a decoder, from its configuration alone.

Training costs 6 FLOPs a token and matrix weight (2 forward, 4 backward), and 12 * heads * head_dim a token and visible
key in every layer (scores and values, forward and backward). Recomputation is not counted. Source: PaLM,
arXiv:2204.02311, appendix B, with causal attention counted by the keys that are seen.
"""

from ..configs.model import ModelConfig


def matrix_parameters(model: ModelConfig) -> int:
    """Weights that every token is multiplied with: the blocks' kernels and the head; an embedding is looked up."""
    attention = model.embed * model.head_width * 2 * (model.heads + model.key_value_heads)
    maps = 2 if model.activation == "gelu" else 3
    return model.layers * (attention + maps * model.embed * model.mlp) + model.embed * model.vocab


def visible_keys(length: int, window: int | None) -> float:
    """Keys a query sees on average in a row of `length` tokens, causal, within `window`."""
    reach = min(window or length, length)
    return reach - reach * (reach - 1) / (2 * length)


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """FLOPs to train on one token, forward and backward, in rows of `sequence_length`."""
    windows = [model.windows[layer % len(model.windows)] for layer in range(model.layers)]
    keys = sum(visible_keys(sequence_length, window) for window in windows)
    return 6.0 * matrix_parameters(model) + 12.0 * model.heads * model.head_width * keys
