"""Two models' words, compared where the vocabulary is sharded: the plain formulas, and nothing is gathered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel import hlo
from meshwright.parallel.distillation_kl import (
    TopTokens,
    distribution_overlap,
    kl_divergence,
    top_tokens,
    top_tokens_kl_divergence,
)
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.sharding import constrainer
from meshwright.parallel.vocabulary import OutputHead

BATCH, SEQUENCE, ROWS, VOCAB = 8, 16, 64, 61
MESHES = {"one": {}, "tensor": {"tensor": 4}, "all": {"fsdp": 2, "seq": 2, "tensor": 2}}


@pytest.fixture
def heads():
    """Two models of different width."""
    random = np.random.default_rng(0)
    made = [(random.standard_normal((BATCH, SEQUENCE, n)), random.standard_normal((n, ROWS))) for n in (8, 4)]
    return [OutputHead(*(jnp.asarray(x, jnp.float32) for x in head)) for head in made]


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
    taken = [(a.hidden, a.kernel) if isinstance(a, OutputHead) else a for a in arguments]
    call = lambda *given: function(
        *(OutputHead(*g) if isinstance(a, OutputHead) else g for a, g in zip(arguments, given, strict=True)), **settings
    )
    with jax.set_mesh(mesh):
        compiled = jax.jit(call).lower(*taken).compile()
        return compiled(*taken), compiled.as_text()


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_its_formula(heads, targets, axes, temperature):
    found, _ = on(axes, kl_divergence, *heads, targets, temperature=temperature)
    p, q = (plain(head, temperature) for head in heads)
    np.testing.assert_allclose(found.divergence, (np.exp(p) * (p - q)).sum(-1), rtol=1e-5)
    said = np.take_along_axis(plain(heads[1]), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(found.logprobs, said, rtol=1e-5)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("count", [5, 40])
def test_the_likeliest_words_are_those_of_a_sort(heads, axes, count):
    found, _ = on(axes, top_tokens, heads[0], count=count, temperature=2.0)
    wanted = plain(heads[0], 2.0)
    order = np.argsort(-wanted, axis=-1)[..., :count]
    assert found.tokens.shape == (BATCH, SEQUENCE, count)
    np.testing.assert_array_equal(found.tokens, order)
    np.testing.assert_allclose(found.logprobs, np.take_along_axis(wanted, order, -1), rtol=1e-5)


def top_of(head, count, temperature):
    wanted = plain(head, temperature)
    order = np.argsort(-wanted, axis=-1)[..., :count]
    return TopTokens(jnp.asarray(np.take_along_axis(wanted, order, -1), jnp.float32), jnp.asarray(order, jnp.int32))


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_words_that_were_not_stored_are_one_word(heads, targets, axes):
    top = top_of(heads[0], 5, 2.0)
    found, _ = on(axes, top_tokens_kl_divergence, top, heads[1], targets, temperature=2.0)
    p, q = plain(heads[0], 2.0), plain(heads[1], 2.0)
    p, q = (np.exp(np.take_along_axis(x, np.asarray(top.tokens), -1)) for x in (p, q))
    p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
    np.testing.assert_allclose(found.divergence, (p * np.log(p / q)).sum(-1), rtol=1e-4, atol=1e-6)


def test_all_words_stored_are_the_whole_divergence(heads, targets):
    """And fewer say less: what is lumped together differs by less."""
    whole, _ = on({}, kl_divergence, *heads, targets, temperature=1.0)
    all_of_them, few = (
        on({}, top_tokens_kl_divergence, top_of(heads[0], count, 1.0), heads[1], targets, temperature=1.0)[0]
        for count in (VOCAB, 3)
    )
    np.testing.assert_allclose(all_of_them.divergence, whole.divergence, rtol=1e-4, atol=1e-6)
    assert (few.divergence < whole.divergence).all() and (few.divergence > -1e-6).all()


def test_the_gradient_is_what_they_say_differently(heads, targets):
    """Of KL by the logits: q - p; with stored words, q - p of these, and the rest scaled as one word."""
    wanted, said = heads
    p, q = np.exp(plain(wanted)), np.exp(plain(said))

    def by_hidden(hidden):
        top = top_of(wanted, VOCAB, 1.0)
        settings = {"temperature": 1.0, "vocab": VOCAB, "chunks": 1, "constrain": lambda x, names: x}
        return top_tokens_kl_divergence(top, OutputHead(hidden, said.kernel), targets, **settings).divergence.sum()

    found = jax.jit(jax.grad(by_hidden))(said.hidden)
    np.testing.assert_allclose(found, (q - p) @ np.asarray(said.kernel, np.float64)[:, :VOCAB].T, atol=2e-4)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_overlap_is_the_acceptance_of_speculative_sampling(heads, axes):
    found, _ = on(axes, distribution_overlap, *heads)
    p, q = (np.exp(plain(head)) for head in heads)
    np.testing.assert_allclose(found, np.minimum(p, q).sum(-1), rtol=1e-5)
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
        assert max((one.bytes for one in hlo.collectives(text, mesh)), default=0) < logits / 2
