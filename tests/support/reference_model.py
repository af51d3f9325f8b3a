"""The decoder in numpy float64, one token and one head at a time: the reference of the tests of models.

Written from the papers and not from `models/`: rotations are complex numbers, a softmax is over a list of visible keys.
Weights come by canonical name (`layers/3/attn/q/kernel`).
"""

import math

import numpy as np

from meshwright.configs.sections.model import ModelConfig, RopeConfig

Weights = dict[str, np.ndarray]


def logits(model: ModelConfig, weights: Weights, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray):
    """[rows, sequence, vocab] from three [rows, sequence] arrays."""
    weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    return np.stack([row_logits(model, weights, *row) for row in zip(tokens, segments, positions, strict=True)])


def row_logits(model: ModelConfig, weights: Weights, tokens: np.ndarray, segments: np.ndarray, positions: np.ndarray):
    """[sequence, vocab] of one row."""
    x = weights["embed/embedding"][tokens]
    if model.embedding_scale:
        x = x * math.sqrt(model.embed)
    if model.position_encoding == "learned":
        x = x + weights["embed/positions"][positions]
    for layer in range(model.layers):
        own = {name.removeprefix(f"layers/{layer}/"): array for name, array in weights.items()}
        window = model.windows[layer % len(model.windows)]
        x = block(model, own, x, segments, positions, window)
    head = weights["embed/embedding"].T if model.tied_embeddings else weights["head/kernel"]
    return softcap(norm(model, weights, "final_norm", x) @ head, model.logit_softcap)


def block(model: ModelConfig, own: Weights, x: np.ndarray, segments: np.ndarray, positions: np.ndarray, window):
    """One layer's output [sequence, embed]."""
    normed = norm(model, own, "attn_norm", x) if model.pre_norms else x
    update = attention(model, own, normed, segments, positions, window)
    if model.post_norms:
        update = norm(model, own, "attn_post_norm", update)
    second = x + update
    if model.parallel_block:
        second = normed
    elif model.pre_norms:
        second = norm(model, own, "mlp_norm", second)
    hidden = mlp(model, own, second)
    if model.post_norms:
        hidden = norm(model, own, "mlp_post_norm", hidden)
    return x + update + hidden


def attention(model: ModelConfig, own: Weights, x: np.ndarray, segments: np.ndarray, positions: np.ndarray, window):
    """Each query over the keys it may see, one head at a time."""
    q, k, v = (np.einsum("te,ehd->htd", x, own[f"attn/{name}/kernel"]) for name in "qkv")
    if model.qkv_bias:
        q, k, v = (y + own[f"attn/{name}/bias"][:, None] for name, y in zip("qkv", (q, k, v), strict=True))
    if model.qk_norm_whole:
        q, k = (
            rms(y.swapaxes(0, 1).reshape(len(x), -1), own[f"attn/{name}_norm/scale"].ravel(), model.norm_epsilon)
            .reshape(len(x), *y.shape[::2])
            .swapaxes(0, 1)
            for name, y in (("q", q), ("k", k))
        )
    elif model.qk_norm:
        q, k = (
            rms(y, own[f"attn/{name}_norm/scale"] + model.norm_unit_offset, model.norm_epsilon)
            for name, y in (("q", q), ("k", k))
        )
    if model.position_encoding == "rope":
        q, k = (rotate(y, positions, model.rope, local=window is not None) for y in (q, k))
    scale = model.attention_scale or 1 / math.sqrt(q.shape[-1])
    out = np.zeros_like(q)
    for head in range(len(q)):
        group = head * len(k) // len(q)
        for query in range(len(x)):
            first = 0 if window is None else max(0, query - window + 1)
            visible = [key for key in range(first, query + 1) if segments[key] == segments[query]]
            scores = softcap(k[group, visible] @ q[head, query] * scale, model.attention_softcap)
            weight = np.exp(scores - scores.max())
            out[head, query] = weight @ v[group, visible] / weight.sum()
    update = np.einsum("htd,hde->te", out, own["attn/o/kernel"])
    return update + own["attn/o/bias"] if model.linear_bias else update


def mlp(model: ModelConfig, own: Weights, x: np.ndarray) -> np.ndarray:
    """The feed-forward update [sequence, embed]."""

    def linear(name: str, y: np.ndarray) -> np.ndarray:
        y = y @ own[f"mlp/{name}/kernel"]
        return y + own[f"mlp/{name}/bias"] if model.linear_bias else y

    up = linear("up", x)
    if model.activation == "swiglu":
        gate = linear("gate", x)
        return linear("down", gate / (1 + np.exp(-gate)) * up)
    return linear("down", gelu(linear("gate", x)) * up if model.activation == "geglu" else gelu(up))


def gelu(x: np.ndarray) -> np.ndarray:
    """The tanh form. Source: arXiv:1606.08415, section 2."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(model: ModelConfig, weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """RMSNorm or LayerNorm over the last dimension."""
    scale = weights[f"{name}/scale"]
    if model.norm == "rms":
        return rms(x, scale + model.norm_unit_offset, model.norm_epsilon)
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon)
    return centred / deviation * scale + weights[f"{name}/bias"]


def rms(x: np.ndarray, scale: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def softcap(x: np.ndarray, cap: float | None) -> np.ndarray:
    return x if cap is None else cap * np.tanh(x / cap)


def rotate(x: np.ndarray, positions: np.ndarray, rope: RopeConfig, *, local: bool) -> np.ndarray:
    """x [heads, sequence, head_dim]: pair (i, i + half) is a complex number, multiplied by a unit one."""
    half = x.shape[-1] // 2
    rates, factor = rope_rates(rope, x.shape[-1], local=local)
    turn = np.exp(1j * positions[:, None] * rates) * factor
    pairs = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def rope_rates(rope: RopeConfig, width: int, *, local: bool) -> tuple[np.ndarray, float]:
    """(radians per position of each pair, factor on the unit numbers), by the published rules."""
    unscaled = local and rope.local_theta is not None
    theta = rope.local_theta if unscaled else rope.theta
    rates, factor = [], 1.0
    for pair in range(width // 2):
        rate = 1 / theta ** (2 * pair / width)
        if rope.scaling == "linear" and not unscaled:
            rate = rate / rope.factor
        if rope.scaling == "llama3" and not unscaled:
            rate = llama3_rate(rope, rate)
        if rope.scaling == "yarn" and not unscaled:
            rate = yarn_rate(rope, rate, pair, width)
        rates.append(rate)
    if rope.scaling == "yarn" and not unscaled:
        factor = rope.attention_factor or 0.1 * math.log(rope.factor) + 1
    return np.array(rates), factor


def llama3_rate(rope: RopeConfig, rate: float) -> float:
    """By wavelength: short ones unchanged, long ones divided, interpolated between. Source: Llama 3.1's model card."""
    wavelength = 2 * math.pi / rate
    if wavelength < rope.original_length / rope.high_frequency_factor:
        return rate
    if wavelength > rope.original_length / rope.low_frequency_factor:
        return rate / rope.factor
    smooth = rope.original_length / wavelength - rope.low_frequency_factor
    smooth /= rope.high_frequency_factor - rope.low_frequency_factor
    return (1 - smooth) * rate / rope.factor + smooth * rate


def yarn_rate(rope: RopeConfig, rate: float, pair: int, width: int) -> float:
    """By pair: a ramp between those with beta_fast and beta_slow rotations. Source: arXiv:2309.00071, section 3.2."""
    low, high = (
        width * math.log(rope.original_length / (2 * math.pi * beta)) / (2 * math.log(rope.theta))
        for beta in (rope.beta_fast, rope.beta_slow)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), width - 1)
    ramp = min(max((pair - low) / ((high - low) or 0.001), 0), 1)
    return rate / rope.factor * ramp + rate * (1 - ramp)
