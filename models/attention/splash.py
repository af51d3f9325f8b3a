"""`splash`: JAX's own attention kernel for TPUs (Pallas), which skips blocks of the mask that are empty.

Forward and backward kernels, soft-cap, documents, grouped heads and the window are the library's. Two of its habits
show here: q is scaled before the kernel, so in bfloat16 it is rounded once more unless the scale is a power of two, and
arrays are [heads, sequence, head_dim], without a batch.

The library differentiates its kernel itself, but only from the log-sum-exp that it kept for itself. `backward` takes
`out` and `lse` from the caller, so it calls the function behind that rule, which is private: `_unavailable` compares
its parameters with those that this file passes.
"""

import functools
import inspect

import jax
import jax.numpy as jnp

from .interface import Implementation, Mask, TokenIndices

LANES = 128  # a register's width: blocks are multiples of it
BLOCK_SIDES = (1024, 512, 256, 128)  # tokens, largest first
BLOCK_BYTES = 2**18  # of one block of q, k or v; with twice as much some kernels do not fit into a core's memory
# The fused backward kernel writes one dq for each block of keys, which are added up afterwards: memory that grows with
# the square of the sequence. Beyond this number of blocks a kernel of its own computes dq, and the scores once more.
MOST_FUSED_BLOCKS = 8
WIDEST_HEAD = 256
# Parameters of the private backward function, in order; `SplashAttentionKernel.kwargs` has the settings.
SETTINGS = (
    "save_residuals", "mask_value", "is_mqa", "block_sizes",
    "residual_checkpoint_name", "mask_function", "attn_logits_soft_cap", "interpret",
)  # fmt: skip
PARAMETERS = (*SETTINGS, "res", "do")


def make_splash(*, interpret: bool) -> Implementation:
    """The implementation: compiled for a TPU, or interpreted on any device, which is slow and meant for tests."""

    def refuse(mask: Mask, indices: TokenIndices, q, k, platform: str | None) -> str | None:
        if platform not in (None, "tpu") and not interpret:
            return f"runs on TPUs, not on {platform}"
        return _refuse_arrays(indices, q, k) or _unavailable()

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, indices: TokenIndices):
        """out like q, and lse [batch, queries, heads]."""
        kernel = _make_kernel(q, mask, interpret)
        attend = jax.vmap(lambda q, k, v, segments: kernel(q, k, v, segment_ids=segments))
        out, (lse,) = attend(_scale_queries(q, mask), _by_head(k), _by_head(v), _segments(indices))
        if indices.query_segments is not None:
            # A query whose document has no key: the kernel gives every key the lowest score, and averages them.
            hidden = lse < kernel.kwargs["mask_value"] / 2
            out, lse = jnp.where(hidden[..., None], 0, out), jnp.where(hidden, -jnp.inf, lse)
        return _by_head(out), lse.swapaxes(1, 2)

    def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices):
        """dq, dk, dv like q, k, v, given `out` and `lse` over all keys."""
        module, kernel = _library()[0], _make_kernel(q, mask, interpret)
        settings = [kernel.kwargs[name] for name in SETTINGS]

        def differentiate(q, k, v, segments, out, lse, d_out):
            residuals = (q, k, v, segments, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
            return module._splash_attention_bwd(*settings, residuals, d_out)[3:6]

        # exp(lowest score - 0) is 0: no gradient of a query that sees no key.
        lse = jnp.where(jnp.isneginf(lse), 0, lse).swapaxes(1, 2)
        k, v, out, d_out = map(_by_head, (k, v, out, d_out))
        dq, dk, dv = jax.vmap(differentiate)(_scale_queries(q, mask), k, v, _segments(indices), out, lse, d_out)
        dq = (_scale(q, mask) * dq.astype(jnp.float32)).astype(q.dtype)  # the kernel's is that of the scaled q
        return tuple(map(_by_head, (dq, dk, dv)))

    return Implementation("splash", refuse, forward, backward, needs_all_axes_manual=True)


def _refuse_arrays(indices: TokenIndices, q, k) -> str | None:
    # Keys of ALL_SEGMENTS, which the kernel would take for those of one more document, need no case of their own: they
    # come from the prefix of an adapter, which always has explicit indices and more keys than queries
    # (models/kv_cache.py).
    _, queries, _, head_dim = q.shape
    if indices.query_index is not None:
        return "needs tokens in plain order (explicit indices are given)"
    if queries != k.shape[1]:
        return f"needs as many queries as keys, not {queries} and {k.shape[1]}"
    if queries % LANES:
        return f"needs sequences in multiples of {LANES} tokens, not {queries}"
    if head_dim % 8 or head_dim > WIDEST_HEAD:
        return f"needs head_dim in multiples of 8 up to {WIDEST_HEAD}, not {head_dim}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"computes in bfloat16 or float32, not {jnp.dtype(q.dtype).name}"
    return None


def _library():
    """The library's modules of the kernel and of masks. Imported late: only programs for TPUs need them."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    return splash_attention_kernel, splash_attention_mask


@functools.cache
def _unavailable() -> str | None:
    """What this file needs that the installed JAX does not have, or None."""
    try:
        backward = _library()[0]._splash_attention_bwd
    except (ImportError, AttributeError) as error:
        return f"is not in JAX {jax.__version__} as this version of meshwright needs it ({error})"
    parameters = tuple(inspect.signature(backward).parameters)
    if parameters != PARAMETERS:
        return f"has another backward function in JAX {jax.__version__}: its parameters are {', '.join(parameters)}"
    return None


def _make_kernel(q: jax.Array, mask: Mask, interpret: bool):
    """The library's kernel for q [batch, queries, heads, head_dim] and as many keys."""
    module, masks = _library()
    _, tokens, heads, head_dim = q.shape
    shape = (tokens, tokens)
    if mask.window is not None:  # the library counts the tokens before the query
        visible = masks.LocalMask(shape, (mask.window - 1, 0), offset=0)
    else:
        visible = masks.CausalMask(shape) if mask.causal else masks.FullMask(shape)
    side = block_side(tokens, -(-head_dim // LANES) * LANES * q.dtype.itemsize)
    fused = tokens // side <= MOST_FUSED_BLOCKS
    sizes = module.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), side),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), side),
        **dict.fromkeys(("block_q_dq", "block_kv_dq"), None if fused else side),
        use_fused_bwd_kernel=fused,
    )
    return module.make_splash_mha(
        masks.MultiHeadMask([visible] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        attn_logits_soft_cap=mask.softcap,
        interpret=interpret,
    )


def block_side(tokens: int, token_bytes: int) -> int:
    """Tokens along either side of a block: the largest side that divides `tokens` and fits the memory of a core.

    `token_bytes` is the size of one head of one token, in whole registers.

    >>> block_side(4096, 256), block_side(4096, 512), block_side(640, 256)
    (1024, 512, 128)
    """
    return next(side for side in BLOCK_SIDES if tokens % side == 0 and side * token_bytes <= BLOCK_BYTES)


def _segments(indices: TokenIndices):
    if indices.query_segments is None:
        return None
    return _library()[0].SegmentIds(indices.query_segments, indices.key_segments)


def _scale(q, mask: Mask) -> float:
    return q.shape[-1] ** -0.5 if mask.scale is None else mask.scale


def _scale_queries(q, mask: Mask):
    return _by_head((_scale(q, mask) * q.astype(jnp.float32)).astype(q.dtype))


def _by_head(x):
    """[batch, sequence, heads, head_dim] <-> [batch, heads, sequence, head_dim]."""
    return x.swapaxes(1, 2)


SPLASH = make_splash(interpret=False)
