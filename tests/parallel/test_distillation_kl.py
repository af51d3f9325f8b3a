"""Divergence of two models with a sharded vocabulary: the plain formulas, and no logits are gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel.distillation_kl import (
    TopTokens,
    distribution_overlap,
    kl_divergence,
    top_tokens,
    top_tokens_kl_divergence,
)
from meshwright.parallel.hlo import collectives as hlo
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.sharding import constrainer
from meshwright.parallel.vocabulary import OutputHead

BATCH, SEQUENCE, ROWS, VOCAB = 8, 16, 64, 61
MESHES = {"one": {}, "tensor": {"tensor": 4}, "all": {"fsdp": 2, "seq": 2, "tensor": 2}}


@pytest.fixture
def heads():
    """Two models of different width."""
    random = np.random.default_rng(0)
    arrays = [(random.standard_normal((BATCH, SEQUENCE, n)), random.standard_normal((n, ROWS))) for n in (8, 4)]
    return [OutputHead(*(jnp.asarray(x, jnp.float32) for x in head)) for head in arrays]


@pytest.fixture
def targets():
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (BATCH, SEQUENCE), dtype=np.int32))


def plain(head, temperature=1.0):
    """log p of the whole vocabulary, in float64."""
    scores = np.asarray(head.hidden, np.float64) @ np.asarray(head.kernel, np.float64)
    return log_softmax(scores[..., :VOCAB] / temperature, axis=-1)


def on(axes, function, *arguments, chunks=2, **settings):
    mesh = make_mesh(MeshConfig(**axes, platform="cpu"))
    settings |= {"vocab": VOCAB, "chunks": chunks, "constrain": constrainer(mesh)}
    # A head's softcap is no array.
    leaves = [(a.hidden, a.kernel) if isinstance(a, OutputHead) else a for a in arguments]
    call = lambda *given: function(
        *(OutputHead(*g) if isinstance(a, OutputHead) else g for a, g in zip(arguments, given, strict=True)), **settings
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(call).lower(*leaves).compile()
        return compiled(*leaves), compiled.as_text()


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_equals_its_formula(heads, targets, axes, temperature):
    result, _ = on(axes, kl_divergence, *heads, targets, temperature=temperature)
    p, q = (plain(head, temperature) for head in heads)
    np.testing.assert_allclose(result.divergence, (np.exp(p) * (p - q)).sum(-1), rtol=1e-5)
    student = np.take_along_axis(plain(heads[1]), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(result.logprobs, student, rtol=1e-5)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("count", [5, 40])
def test_the_likeliest_tokens_are_those_of_a_sort(heads, axes, count):
    result, _ = on(axes, top_tokens, heads[0], count=count, temperature=2.0)
    teacher = plain(heads[0], 2.0)
    order = np.argsort(-teacher, axis=-1)[..., :count]
    assert result.tokens.shape == (BATCH, SEQUENCE, count)
    np.testing.assert_array_equal(result.tokens, order)
    np.testing.assert_allclose(result.logprobs, np.take_along_axis(teacher, order, -1), rtol=1e-5)


def top_of(head, count, temperature):
    teacher = plain(head, temperature)
    order = np.argsort(-teacher, axis=-1)[..., :count]
    return TopTokens(jnp.asarray(np.take_along_axis(teacher, order, -1), jnp.float32), jnp.asarray(order, jnp.int32))


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_tokens_that_are_not_stored_count_as_one_token(heads, targets, axes):
    top = top_of(heads[0], 5, 2.0)
    result, _ = on(axes, top_tokens_kl_divergence, top, heads[1], targets, temperature=2.0)
    p, q = plain(heads[0], 2.0), plain(heads[1], 2.0)
    p, q = (np.exp(np.take_along_axis(x, np.asarray(top.tokens), -1)) for x in (p, q))
    p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
    np.testing.assert_allclose(result.divergence, (p * np.log(p / q)).sum(-1), rtol=1e-4, atol=1e-6)


def test_with_all_tokens_stored_the_divergence_is_exact(heads, targets):
    """With fewer tokens it is smaller: the others count as one token."""
    exact, _ = on({}, kl_divergence, *heads, targets, temperature=1.0)
    every_token, few = (
        on({}, top_tokens_kl_divergence, top_of(heads[0], count, 1.0), heads[1], targets, temperature=1.0)[0]
        for count in (VOCAB, 3)
    )
    np.testing.assert_allclose(every_token.divergence, exact.divergence, rtol=1e-4, atol=1e-6)
    assert (few.divergence < exact.divergence).all() and (few.divergence > -1e-6).all()


def test_the_gradient_is_the_difference_of_the_distributions(heads, targets):
    """The gradient of KL by the logits is q - p."""
    teacher, student = heads
    p, q = np.exp(plain(teacher)), np.exp(plain(student))

    def by_hidden(hidden):
        top = top_of(teacher, VOCAB, 1.0)
        settings = {"temperature": 1.0, "vocab": VOCAB, "chunks": 1, "constrain": lambda x, names: x}
        return top_tokens_kl_divergence(top, OutputHead(hidden, student.kernel), targets, **settings).divergence.sum()

    result = jax.jit(jax.grad(by_hidden))(student.hidden)
    np.testing.assert_allclose(result, (q - p) @ np.asarray(student.kernel, np.float64)[:, :VOCAB].T, atol=2e-4)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_the_overlap_is_the_acceptance_rate_of_speculative_sampling(heads, axes):
    result, _ = on(axes, distribution_overlap, *heads)
    p, q = (np.exp(plain(head)) for head in heads)
    np.testing.assert_allclose(result, np.minimum(p, q).sum(-1), rtol=1e-5)
    same, _ = on(axes, distribution_overlap, heads[0], heads[0])
    np.testing.assert_allclose(same, 1, rtol=1e-5)


def test_no_logits_are_gathered(heads, targets):
    axes = {"tensor": 4}
    mesh = make_mesh(MeshConfig(**axes, platform="cpu"))
    logits = BATCH * SEQUENCE * ROWS * 4
    for text in (
        on(axes, kl_divergence, *heads, targets, temperature=1.0, chunks=1)[1],
        on(axes, top_tokens_kl_divergence, top_of(heads[0], 3, 1.0), heads[1], targets, temperature=1.0, chunks=1)[1],
    ):
        assert max((op.bytes for op in hlo.collectives(text, mesh)), default=0) < logits / 2
