"""Speculative decoding: texts are the target's whatever the draft is, and counts are those of the algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.equivalence import tiny

from meshwright.configs.errors import UserError
from meshwright.models.context import Context
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.program import build
from meshwright.train.infer.generate import generate
from meshwright.train.infer.sampling import GREEDY, Sampling, probabilities
from meshwright.train.infer.speculative import LoadedModel, speculate, verify_draft

PROMPTS = [[5, 9, 2], [17] * 12 + [3], [60]]
TOKENS = 11


def make_model(*, seed=0, noise=0.0, **model):
    """A model far from its initial weights, or close to the one of that seed."""
    config = tiny(model=model)
    program = build(config, make_mesh(config.mesh))
    random, other = np.random.default_rng(seed), np.random.default_rng(7)
    normal = lambda shape: 0.4 * random.normal(size=shape) + noise * other.normal(size=shape)
    weights = jax.tree.map(lambda leaf: normal(leaf.shape).astype(np.float32), program.shapes.params)
    return LoadedModel(program, weights)


@pytest.fixture(scope="module")
def target():
    return make_model()


def decode_speculatively(target, draft, *, ahead=3, sampling=GREEDY, eos=None, prompts=PROMPTS):
    key = jax.random.key(0)
    return speculate(target, draft, prompts, draft_length=ahead, max_tokens=TOKENS, sampling=sampling, eos=eos, key=key)


def decode(target, **changes):
    settings = {"max_tokens": TOKENS, "sampling": GREEDY, "eos": None, "key": jax.random.key(0)} | changes
    return generate(*target, PROMPTS, **settings)


def greedy_next(model):
    """tokens -> the likeliest next token of `model`, without a cache."""

    @jax.jit
    def forward(tokens):
        decoder = nnx.merge(model.program.graph, model.weights)
        ctx = Context(positions=jnp.arange(tokens.shape[1])[None])
        return decoder.hidden(tokens, ctx)[0] @ decoder.head_kernel(jnp.float32)

    def after(tokens):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        return int(np.argmax(forward(padded)[0, len(tokens) - 1, : model.program.config.model.vocab]))

    return after


def reference_counts(target, draft, *, ahead):
    """(tokens, passes, accepted, examined) of the algorithm at temperature 0, in plain Python."""
    target_next, draft_next = greedy_next(target), greedy_next(draft)
    counts = np.zeros(4, int)
    for prompt in PROMPTS:
        text = list(prompt)
        while len(text) < len(prompt) + TOKENS:
            proposals = list(text)
            for _ in range(ahead):
                proposals.append(draft_next(proposals))
            accepted = 0
            while accepted < ahead and proposals[len(text)] == target_next(text):
                text.append(proposals[len(text)])
                accepted += 1
            text.append(target_next(text))
            counts += [accepted + 1, 1, accepted, accepted + (accepted < ahead)]
    return counts.tolist()


DRAFTS = {
    "similar": {"noise": 0.05},
    "similar, with other windows": {"noise": 0.02, "windows": [4, None]},
    "unrelated, of another size": {"seed": 1, "layers": 1, "embed": 24},
}


CASES = [pytest.param(draft, marks=[pytest.mark.slow] if "windows" in draft else [], id=name)
         for name, draft in DRAFTS.items()]  # fmt: skip


@pytest.mark.parametrize("draft", CASES)
def test_a_greedy_text_is_the_targets_and_its_counts_those_of_the_algorithm(target, draft):
    draft = make_model(**draft)
    result = decode_speculatively(target, draft)
    assert result.texts == decode(target)
    assert [result.tokens, result.passes, result.accepted, result.examined] == reference_counts(target, draft, ahead=3)


def test_a_similar_draft_is_accepted_more_often(target):
    close, far = (
        decode_speculatively(target, make_model(**DRAFTS[name])) for name in ("similar", "unrelated, of another size")
    )
    assert 0 <= far.acceptance < close.acceptance < 1
    assert 1 <= far.block_efficiency < close.block_efficiency < 4


def test_a_model_accepts_its_own_drafts(target):
    result = decode_speculatively(target, target, ahead=2, sampling=Sampling(temperature=0.7, top_k=9))
    assert result.acceptance == 1 and result.block_efficiency == 3
    assert all(len(text) == TOKENS for text in result.texts)


def test_a_text_ends_before_eos_and_later_tokens_are_not_counted(target):
    eos = decode(target)[0][4]
    result = decode_speculatively(target, target, ahead=3, eos=eos, prompts=PROMPTS[:1])
    assert result.texts == decode(target, eos=eos)[:1]
    assert result.tokens == len(result.texts[0]) + 1
    assert result.acceptance == 1


def test_tokens_have_the_targets_distribution():
    """The first token, and the second, if the first was accepted and if not."""
    random = np.random.default_rng(0)
    scores = jnp.asarray(random.normal(size=(2, 3, 5)).astype(np.float32))
    p, q = (probabilities(each, sampling=Sampling(temperature=0.6)) for each in scores)
    q = q[:2]

    @jax.vmap
    def draw(key):
        keys = jax.random.split(key)
        proposals = jax.random.categorical(keys[0], jnp.log(q))
        accepted, token = verify_draft(p, q, proposals, keys[1])
        return jnp.where(accepted > 0, proposals[0], token), accepted

    first, accepted = draw(jax.random.split(jax.random.key(1), 20000))
    often = np.bincount(first, minlength=5) / len(first)
    np.testing.assert_allclose(often, p[0], atol=0.015)
    overlaps = np.minimum(p[:2], q).sum(axis=-1)
    assert np.mean(accepted > 0) == pytest.approx(overlaps[0], abs=0.015)
    assert np.mean(accepted == 2) == pytest.approx(overlaps[0] * overlaps[1], abs=0.015)


def test_a_draft_length_of_zero_is_refused(target):
    with pytest.raises(UserError, match="--ahead: 0"):
        decode_speculatively(target, target, ahead=0)
