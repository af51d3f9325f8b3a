"""Every implementation of attention that runs here, against the definition in float64 NumPy."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshwright.models.attention import blockwise
from meshwright.models.attention.interface import Mask, TokenIndices, attend
from meshwright.models.attention.registry import IMPLEMENTATIONS

HEAD_DIM = 8


class Case(NamedTuple):
    mask: Mask = Mask()
    indices: TokenIndices = TokenIndices()
    queries: int = 40
    keys: int = 40
    heads: int = 4
    kv_heads: int = 4
    dtype: str = "float32"


# Implementations of which at least the plainest case runs on a CPU.
TOKENS = jax.ShapeDtypeStruct((1, 8, 1, HEAD_DIM), jnp.float32)
PORTABLE = [
    name for name, one in IMPLEMENTATIONS.items() if not one.refuse(Mask(), TokenIndices(), TOKENS, TOKENS, "cpu")
]


def documents(*lengths):
    """Two rows of packed documents: `lengths`, and the same backwards."""
    rows = [np.repeat(np.arange(len(order), dtype=np.int32), order) for order in (lengths, lengths[::-1])]
    return np.stack(rows)


def zigzag(tokens, rank, ranks):
    chunks = np.arange(tokens, dtype=np.int32).reshape(2 * ranks, -1)
    return np.concatenate([chunks[rank], chunks[2 * ranks - 1 - rank]])


PACKED = documents(5, 20, 15)
ZIGZAG = TokenIndices(zigzag(96, 1, 4), np.concatenate([zigzag(96, rank, 4) for rank in range(4)]))
ALIEN = np.where(np.arange(40) < 10, 7, PACKED).astype(np.int32)  # 10 queries of a document no key belongs to

CASES = {
    "causal": Case(),
    "both-ways": Case(Mask(causal=False)),
    "window": Case(Mask(window=7)),
    "window-of-one-block": Case(Mask(window=16)),
    "window-implies-order": Case(Mask(causal=False, window=7)),
    "segments": Case(indices=TokenIndices(query_segments=PACKED, key_segments=PACKED)),
    "segments-both-ways": Case(Mask(causal=False), TokenIndices(query_segments=PACKED, key_segments=PACKED)),
    "grouped": Case(kv_heads=2),
    "multi-query": Case(kv_heads=1),
    "softcap": Case(Mask(softcap=1.5)),
    "scale": Case(Mask(scale=0.7)),
    "odd": Case(queries=37, keys=37, kv_heads=2),
    "one-token": Case(queries=1, keys=1),
    "cross": Case(Mask(causal=False), queries=19, keys=47),
    "long": Case(queries=83, keys=83, kv_heads=2),
    "long-both-ways": Case(Mask(causal=False), queries=83, keys=83),
    "long-window": Case(Mask(window=21, softcap=2.0), queries=96, keys=96),
    "zigzag": Case(indices=ZIGZAG, queries=24, keys=96),
    "zigzag-window": Case(Mask(window=30), ZIGZAG, queries=24, keys=96),
    "cache": Case(
        indices=TokenIndices(np.arange(20, 23, dtype=np.int32), np.arange(50, dtype=np.int32)), queries=3, keys=50
    ),
    "unseen-future": Case(indices=TokenIndices(np.arange(40, dtype=np.int32), np.arange(9, 49, dtype=np.int32))),
    "unseen-document": Case(indices=TokenIndices(query_segments=ALIEN, key_segments=PACKED)),
    "bfloat16": Case(kv_heads=2, dtype="bfloat16"),
    "bfloat16-long": Case(queries=83, keys=83, dtype="bfloat16"),
    "everything": Case(
        Mask(window=50, softcap=2.0, scale=0.5),
        TokenIndices(
            ZIGZAG.query_index,
            ZIGZAG.key_index,
            documents(30, 40, 26)[:, ZIGZAG.query_index],
            documents(30, 40, 26)[:, ZIGZAG.key_index],
        ),
        queries=24,
        keys=96,
        kv_heads=2,
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks so small that tiny shapes have several, some of them padded, and `blockwise` walks in both ways."""
    for name, value in {"ROW_BLOCK": 24, "LONGEST_UNROLLED": 64, "SMALLEST_BLOCK": 16, "LARGEST_BLOCK": 16}.items():
        monkeypatch.setattr(blockwise, name, value)


def arrays(case):
    """q, k, v, d_out of a case, with values that are exact in every dtype."""
    random, q_shape = np.random.default_rng(0), (2, case.queries, case.heads, HEAD_DIM)
    kv_shape = (2, case.keys, case.kv_heads, HEAD_DIM)
    return [
        jnp.asarray(random.normal(size=shape), jnp.bfloat16).astype(case.dtype)
        for shape in (q_shape, kv_shape, kv_shape, q_shape)
    ]


def reference_attention(q, k, v, d_out, mask, indices):
    """out, lse, dq, dk, dv in float64, by the softmax's own Jacobian, which mentions neither out nor lse."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    scale = q.shape[-1] ** -0.5 if mask.scale is None else mask.scale
    s = scale * np.einsum("bqhd,bkhd->bhqk", q, k)
    slope = np.ones_like(s)
    if mask.softcap:
        s, slope = mask.softcap * np.tanh(s / mask.softcap), np.cosh(s / mask.softcap) ** -2
    i = np.arange(q.shape[1]) if indices.query_index is None else np.asarray(indices.query_index)
    j = np.arange(k.shape[1]) if indices.key_index is None else np.asarray(indices.key_index)
    visible = np.ones(s.shape, bool)
    if mask.causal:
        visible &= j <= i[:, None]
    if mask.window:
        visible &= (i[:, None] - j >= 0) & (i[:, None] - j < mask.window)
    if indices.query_segments is not None:
        visible &= (np.asarray(indices.query_segments)[:, :, None] == np.asarray(indices.key_segments)[:, None])[
            :, None
        ]
    e = np.where(visible, np.exp(s), 0.0)
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total, total, 1.0)
    dp = np.einsum("bqhd,bkhd->bhqk", d_out, v)
    ds = scale * slope * p * (dp - (p * dp).sum(-1, keepdims=True))
    with np.errstate(divide="ignore"):
        lse = np.log(total[..., 0]).transpose(0, 2, 1)
    dk, dv = np.einsum("bhqk,bqhd->bkhd", ds, q), np.einsum("bhqk,bqhd->bkhd", p, d_out)
    dk, dv = (x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3) for x in (dk, dv))
    return np.einsum("bhqk,bkhd->bqhd", p, v), lse, np.einsum("bhqk,bkhd->bqhd", ds, k), dk, dv


def output_and_gradients(implementation, mask, q, k, v, d_out, indices):
    """out, lse, dq, dk, dv as one compiled program."""

    def run(q, k, v, d_out, indices):
        out, pull = jax.vjp(lambda q, k, v: attend(implementation, q, k, v, mask, indices), q, k, v)
        return out, implementation.forward(q, k, v, mask, indices)[1], *pull(d_out)

    return jax.jit(run)(q, k, v, d_out, indices)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", PORTABLE)
def test_output_log_sum_exp_and_gradients_equal_the_definition(name, case):
    implementation, (q, k, v, d_out) = IMPLEMENTATIONS[name], arrays(case)
    if reason := implementation.refuse(case.mask, case.indices, q, k, "cpu"):
        assert name not in ("dense", "blockwise"), "what `auto` falls back to refuses nothing"
        pytest.skip(f"{name} {reason}")
    actual = output_and_gradients(implementation, case.mask, q, k, v, d_out, case.indices)
    for label, like in zip(("out", "dq", "dk", "dv"), (q, q, k, v), strict=True):
        index = ("out", "lse", "dq", "dk", "dv").index(label)
        assert (actual[index].shape, actual[index].dtype) == (like.shape, like.dtype), f"{label} is not like its array"
    assert actual[1].dtype == jnp.float32, "the log-sum-exp is always float32"
    tolerance = {"float32": 2e-5, "bfloat16": 4e-2}[case.dtype]
    for label, ours, exact in zip(
        ("out", "lse", "dq", "dk", "dv"),
        actual,
        reference_attention(q, k, v, d_out, case.mask, case.indices),
        strict=True,
    ):
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), exact, rtol=tolerance, atol=tolerance * 2, err_msg=label
        )


@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize("mask", [Mask(), Mask(window=30, softcap=2.0)], ids=["causal", "window-softcap"])
def test_results_over_two_halves_of_the_keys_combine_to_those_over_all_keys(name, mask):
    """The ring identity: partial softmaxes merge by log-sum-exp, partial gradients from the merged statistics add."""
    implementation, case = IMPLEMENTATIONS[name], Case(queries=48, keys=48, kv_heads=2)
    q, k, v, d_out = arrays(case)
    index = np.arange(48, dtype=np.int32)
    halves = [(k[:, part], v[:, part], TokenIndices(index, index[part])) for part in (slice(0, 24), slice(24, 48))]

    def run(q, d_out, halves):
        outs, lses = zip(*(implementation.forward(q, *half[:2], mask, half[2]) for half in halves), strict=True)
        lse = jnp.logaddexp(*lses)
        out = sum(out * jnp.exp(part - lse)[..., None] for out, part in zip(outs, lses, strict=True))
        gradients = [implementation.backward(q, *half[:2], out, lse, d_out, mask, half[2]) for half in halves]
        dq = gradients[0][0] + gradients[1][0]
        dk, dv = (jnp.concatenate([gradients[0][n], gradients[1][n]], axis=1) for n in (1, 2))
        return out, lse, dq, dk, dv

    for ours, exact in zip(
        jax.jit(run)(q, d_out, halves),
        reference_attention(q, k, v, d_out, mask, TokenIndices(index, index)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, exact, rtol=2e-5, atol=4e-5)


@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize("case", [CASES["window"], CASES["zigzag"]], ids=["window", "zigzag"])
def test_replicas_under_vmap_are_independent(name, case):
    """A leading replica axis by `vmap`, as low-communication training adds it, changes nothing."""
    q, k, v, d_out = arrays(case)
    replicas = [jnp.stack([x, x[::-1]]) for x in (q, k, v)]

    def gradient(q, k, v):
        def loss(q, k, v):
            return jnp.vdot(attend(IMPLEMENTATIONS[name], q, k, v, case.mask, case.indices), d_out)

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    batched = jax.jit(jax.vmap(gradient))(*replicas)
    for replica in (0, 1):
        separate = reference_attention(*(x[replica] for x in replicas), d_out, case.mask, case.indices)[2:]
        for ours, exact in zip(batched, separate, strict=True):
            np.testing.assert_allclose(ours[replica], exact, rtol=2e-5, atol=4e-5)


@pytest.mark.parametrize("order", ["plain", "permuted"])
def test_blockwise_memory_is_linear_in_the_sequence(order):
    """Twice the tokens at most double the largest array anywhere in the gradient's program."""
    largest = [largest_array(tokens, order) for tokens in (1024, 2048)]
    assert largest[1] <= 2 * largest[0], f"largest arrays: {largest} elements"


def largest_array(tokens, order):
    q = jax.ShapeDtypeStruct((1, tokens, 1, HEAD_DIM), jnp.float32)
    indices = TokenIndices() if order == "plain" else TokenIndices(*(jax.ShapeDtypeStruct((tokens,), jnp.int32),) * 2)

    def loss(q, k, v, indices):
        return attend(IMPLEMENTATIONS["blockwise"], q, k, v, Mask(), indices).sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, q, q, indices).jaxpr
    return max(var.aval.size for jaxpr in all_equations(program) for equation in jaxpr.eqns for var in equation.outvars)


def all_equations(jaxpr):
    yield jaxpr
    for inner in subprograms(jaxpr):
        yield from all_equations(inner)


def subprograms(jaxpr):
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(value, "jaxpr"):
                yield value.jaxpr
            elif hasattr(value, "eqns"):
                yield value
