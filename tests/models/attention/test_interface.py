"""`attend` with any implementation: which tensors a memory policy may keep, and which mistakes are refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from meshwright.configs.errors import UserError
from meshwright.models.attention import blockwise
from meshwright.models.attention.interface import Mask, TokenIndices, attend
from meshwright.models.attention.registry import IMPLEMENTATIONS, choose


def product_count(policy_names):
    """Matrix products in the compiled gradient of a scan over blocks of attention that keeps `policy_names`."""

    def block(x, scale):
        q, k, v = (checkpoint_name(jnp.roll(x * scale, n), name) for n, name in enumerate("qkv"))
        return jnp.sin(attend(IMPLEMENTATIONS["blockwise"], q, k, v, Mask())), None

    policy = jax.checkpoint_policies.save_only_these_names("q", "k", "v", *policy_names)
    # In a loop the compiler cannot see that the recomputed forward pass is the one it has already run.
    gradient = jax.grad(lambda x: jnp.sum(jax.lax.scan(jax.checkpoint(block, policy=policy), x, jnp.arange(2.0))[0]))
    compiled = jax.jit(gradient).lower(jnp.ones((1, 16, 2, 8))).compile().as_text()
    return len(re.findall(r"= \S+ dot\(", compiled))


FORWARD, BACKWARD = 2, 5  # matrix products of each kernel


@pytest.mark.parametrize(
    "names, runs_again",
    [(("attn_out", "attn_lse"), False), (("attn_out",), True), (("attn_lse",), True), ((), True)],
    ids=["both", "no-lse", "no-out", "neither"],
)
def test_the_forward_kernel_runs_again_unless_output_and_log_sum_exp_are_kept(names, runs_again, monkeypatch):
    # Loops of several blocks: the compiler does not merge the products of two loops, as it does straight-line code.
    for name, value in {"LONGEST_UNROLLED": 0, "SMALLEST_BLOCK": 8, "LARGEST_BLOCK": 8}.items():
        monkeypatch.setattr(blockwise, name, value)
    assert (product_count(names) > FORWARD + BACKWARD) == runs_again


def sizes(queries=8, keys=8, heads=4, kv_heads=2, head_dim=8, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((2, queries, heads, head_dim), dtype)
    return q, jax.ShapeDtypeStruct((2, keys, kv_heads, head_dim), dtype)


INDEX, SEGMENTS = jnp.arange(8), jnp.zeros((2, 8), jnp.int32)
CUDNN_REFUSES = {
    "softcap": (Mask(softcap=50.0), TokenIndices(), {}, "soft.*50.0"),
    "segments": (Mask(), TokenIndices(query_segments=SEGMENTS, key_segments=SEGMENTS), {}, "segment"),
    "indices": (Mask(), TokenIndices(INDEX, INDEX), {}, "plain order"),
    "float32": (Mask(), TokenIndices(), {"dtype": jnp.float32}, "not float32"),
    "head_dim": (Mask(), TokenIndices(), {"head_dim": 20}, "not 20"),
    "fewer-queries": (Mask(), TokenIndices(), {"queries": 4}, "not 4 and 8"),
    "device": (Mask(), TokenIndices(), {}, "not on cpu"),
}


@pytest.mark.parametrize("mask, indices, shape, reason", CUDNN_REFUSES.values(), ids=CUDNN_REFUSES)
def test_cudnn_by_name_is_refused_where_it_is_not_exact_and_auto_uses_blockwise(mask, indices, shape, reason):
    q, k = sizes(**shape)
    with pytest.raises(UserError, match=rf"model\.attention: cudnn .*{reason}.*use blockwise"):
        choose("cudnn", mask=mask, indices=indices, q=q, k=k, platform="cpu")
    assert choose("auto", mask=mask, indices=indices, q=q, k=k, platform="cpu").name == "blockwise"


@pytest.mark.parametrize("mask", [Mask(), Mask(window=4), Mask(causal=False), Mask(scale=0.3)])
def test_cudnn_refuses_nothing_it_can_do(mask):
    assert IMPLEMENTATIONS["cudnn"].refuse(mask, TokenIndices(), *sizes(), None) is None


def test_attend_checks_the_implementation_before_it_runs():
    q = jnp.ones((1, 8, 2, 8))
    with pytest.raises(UserError, match="cudnn computes in bfloat16 or float16, not float32"):
        attend(IMPLEMENTATIONS["cudnn"], q, q, q, Mask())


def test_an_unknown_name_lists_the_known_ones():
    q, k = sizes()
    with pytest.raises(UserError, match=r"blokwise matches nothing; .*Did you mean blockwise"):
        choose("blokwise", mask=Mask(), indices=TokenIndices(), q=q, k=k, platform="cpu")


MISFITS = {
    "kv_heads": (sizes(kv_heads=3), TokenIndices(), "3 does not divide 4"),
    "head_dim": ((sizes()[0], sizes(head_dim=16)[1]), TokenIndices(), "differ in batch, keys or head_dim"),
    "index-shape": (sizes(keys=9), TokenIndices(INDEX, INDEX), "key_index has shape .8,."),
    "one-index": (sizes(), TokenIndices(query_index=INDEX), "query_index and key_index go together"),
    "one-segments": (sizes(), TokenIndices(key_segments=SEGMENTS), "query_segments and key_segments go together"),
}


@pytest.mark.parametrize("shapes, indices, message", MISFITS.values(), ids=MISFITS)
def test_the_error_names_arrays_of_a_wrong_shape(shapes, indices, message):
    q, k = shapes
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda q, k, v: attend(IMPLEMENTATIONS["dense"], q, k, v, Mask(), indices), q, k, k)


@pytest.mark.parametrize("wrong", [{"window": 0}, {"softcap": 0.0}, {"softcap": -1.0}])
def test_a_mask_that_hides_every_key_is_refused(wrong):
    with pytest.raises(UserError, match=str(*wrong.values())):
        Mask(**wrong)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs an NVIDIA GPU")
@pytest.mark.parametrize(
    "mask", [Mask(), Mask(window=100), Mask(causal=False), Mask(scale=0.05)], ids=["causal", "window", "both", "scale"]
)
@pytest.mark.parametrize("tokens, kv_heads", [(256, 8), (384, 2), (333, 1)])
def test_cudnn_equals_dense_on_a_gpu(mask, tokens, kv_heads):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, tokens, heads, 64) for heads in (8, kv_heads, kv_heads, 8)]
    q, k, v, d_out = (jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))

    def results(name):
        choose(name, mask=mask, indices=TokenIndices(), q=q, k=k, platform="gpu")
        out, pull = jax.vjp(lambda q, k, v: attend(IMPLEMENTATIONS[name], q, k, v, mask), q, k, v)
        return out, IMPLEMENTATIONS[name].forward(q, k, v, mask, TokenIndices())[1], *pull(d_out)

    for ours, exact in zip(jax.jit(results, static_argnums=0)("cudnn"), results("dense"), strict=True):
        np.testing.assert_allclose(np.float32(ours), np.float32(exact), rtol=3e-2, atol=3e-2)
