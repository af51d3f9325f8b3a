"""`cudnn`: NVIDIA's fused attention through JAX's public function, wherever that function is exact.

It refuses what that function cannot compute exactly: packed documents (the function takes no segments, and a mask as a
bias is quadratic in memory), a soft-cap, tokens out of plain order, float32. The public interface has two consequences:

* The backward pass differentiates that function, so it runs the forward kernel once more and takes the softmax over
  *these* keys: `lse` is not used. Sequence parallelism that adds up partial softmaxes (ring) needs explicit indices,
  which are refused, so it never meets this backward pass.
* `lse` is rounded to the dtype of q; its float32 has no more precision.
"""

import jax
import jax.extend
import jax.numpy as jnp

from .interface import Implementation, Mask, TokenIndices

OLDEST_GPU, WIDE_HEADS_GPU = 8.0, 9.0  # compute capability: Ampere; Hopper for heads wider than 128


def refuse(mask: Mask, indices: TokenIndices, q, k, platform: str | None) -> str | None:
    """Why cuDNN cannot compute this exactly, or None. Reads the GPU's compute capability if `platform` is "gpu"."""
    head_dim = q.shape[-1]
    if mask.softcap is not None:
        return f"cannot cap scores (softcap {mask.softcap})"
    if indices.query_segments is not None:
        return "cannot separate packed documents (segment ids are given)"
    if indices.query_index is not None:
        return "needs tokens in plain order (explicit indices are given)"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, not {jnp.dtype(q.dtype).name}"
    if head_dim % 8 or head_dim > 256:
        return f"needs head_dim in multiples of 8 up to 256, not {head_dim}"
    if (mask.causal or mask.window is not None) and q.shape[1] != k.shape[1]:
        return f"needs as many queries as keys, not {q.shape[1]} and {k.shape[1]}"
    if platform is not None:
        return _refuse_device(platform, head_dim)
    return None


def forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, indices: TokenIndices) -> tuple[jax.Array, jax.Array]:
    """out like q, and lse [batch, queries, heads] as float32 with the precision of q."""
    del indices
    out, lse = _attention(q, k, v, mask, return_residual=True)
    return out, lse.astype(jnp.float32)


def backward(q, k, v, out, lse, d_out, mask: Mask, indices: TokenIndices) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv of attention over exactly these keys."""
    del out, lse, indices
    return jax.vjp(lambda q, k, v: _attention(q, k, v, mask), q, k, v)[1](d_out)


def _attention(q, k, v, mask: Mask, **options):
    window = None if mask.window is None else (mask.window - 1, 0)  # cuDNN counts the tokens before the query
    causal = mask.causal or mask.window is not None
    return jax.nn.dot_product_attention(
        q, k, v, scale=mask.scale, is_causal=causal, local_window_size=window, implementation="cudnn", **options
    )


def _refuse_device(platform: str, head_dim: int) -> str | None:
    if platform not in ("gpu", "cuda"):
        return f"runs on NVIDIA GPUs, not on {platform}"
    if "cuda" not in jax.extend.backend.get_backend("gpu").platform_version.lower():
        return "runs on NVIDIA GPUs only, and this GPU is from another vendor"
    capability = float(jax.local_devices(backend="gpu")[0].compute_capability)
    minimum = WIDE_HEADS_GPU if head_dim > 128 else OLDEST_GPU
    if capability < minimum:
        return f"needs compute capability {minimum} for head_dim {head_dim}, this GPU has {capability}"
    return None


CUDNN = Implementation("cudnn", refuse, forward, backward)
