"""Speculative decoding: what is written is the target's, whatever drafts, and what it took is counted as it was."""

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
from meshwright.train.infer.speculative import Writer, speculate, verified

PROMPTS = [[5, 9, 2], [17] * 12 + [3], [60]]
TOKENS = 11


def writer(*, seed=0, noise=0.0, **model):
    """A model far from its initial weights, or close to the one of that seed."""
    config = tiny(model=model)
    program = build(config, make_mesh(config.mesh))
    random, other = np.random.default_rng(seed), np.random.default_rng(7)
    normal = lambda shape: 0.4 * random.normal(size=shape) + noise * other.normal(size=shape)
    weights = jax.tree.map(lambda leaf: normal(leaf.shape).astype(np.float32), program.shapes.params)
    return Writer(program, weights)


@pytest.fixture(scope="module")
def target():
    return writer()


def spoken(target, draft, *, ahead=3, sampling=GREEDY, eos=None, prompts=PROMPTS):
    key = jax.random.key(0)
    return speculate(target, draft, prompts, ahead=ahead, max_tokens=TOKENS, sampling=sampling, eos=eos, key=key)


def alone(target, **changes):
    settings = {"max_tokens": TOKENS, "sampling": GREEDY, "eos": None, "key": jax.random.key(0)} | changes
    return generate(*target, PROMPTS, **settings)


def likeliest_after(one):
    """tokens -> the likeliest next of `one`, without a cache."""

    @jax.jit
    def forward(tokens):
        decoder = nnx.merge(one.program.graph, one.pretrained_weights)
        ctx = Context(positions=jnp.arange(tokens.shape[1])[None])
        return decoder.hidden(tokens, ctx)[0] @ decoder.head_kernel(jnp.float32)

    def after(tokens):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        return int(np.argmax(forward(padded)[0, len(tokens) - 1, : one.program.config.model.vocab]))

    return after


def by_hand(target, draft, *, ahead):
    """tokens, passes, kept, examined of the algorithm at temperature 0, told in Python."""
    large, small = likeliest_after(target), likeliest_after(draft)
    counts = np.zeros(4, int)
    for prompt in PROMPTS:
        text = list(prompt)
        while len(text) < len(prompt) + TOKENS:
            guess = list(text)
            for _ in range(ahead):
                guess.append(small(guess))
            kept = 0
            while kept < ahead and guess[len(text)] == large(text):
                text.append(guess[len(text)])
                kept += 1
            text.append(large(text))
            counts += [kept + 1, 1, kept, kept + (kept < ahead)]
    return counts.tolist()


DRAFTS = {
    "one like it": {"noise": 0.05},
    "one that has other windows": {"noise": 0.02, "windows": [4, None]},
    "a stranger, of another size": {"seed": 1, "layers": 1, "embed": 24},
}


CASES = [pytest.param(draft, marks=[pytest.mark.slow] if "windows" in draft else [], id=name)
         for name, draft in DRAFTS.items()]  # fmt: skip


@pytest.mark.parametrize("draft", CASES)
def test_a_greedy_text_is_the_targets_and_its_cost_that_of_the_algorithm(target, draft):
    draft = writer(**draft)
    found = spoken(target, draft)
    assert found.texts == alone(target)
    assert [found.tokens, found.passes, found.kept, found.examined] == by_hand(target, draft, ahead=3)


def test_the_drafts_differ_in_what_is_kept(target):
    close, far = (spoken(target, writer(**DRAFTS[name])) for name in ("one like it", "a stranger, of another size"))
    assert 0 <= far.acceptance < close.acceptance < 1
    assert 1 <= far.block_efficiency < close.block_efficiency < 4


def test_its_own_draft_is_always_kept(target):
    found = spoken(target, target, ahead=2, sampling=Sampling(temperature=0.7, top_k=9))
    assert found.acceptance == 1 and found.block_efficiency == 3
    assert all(len(text) == TOKENS for text in found.texts)


def test_a_text_ends_before_eos_and_nothing_behind_it_counts(target):
    eos = alone(target)[0][4]
    found = spoken(target, target, ahead=3, eos=eos, prompts=PROMPTS[:1])
    assert found.texts == alone(target, eos=eos)[:1]
    assert found.tokens == len(found.texts[0]) + 1
    assert found.acceptance == 1


def test_what_is_drawn_is_drawn_as_the_target_draws():
    """Of the first token; and of the second, where the first was kept, or not."""
    random = np.random.default_rng(0)
    scores = jnp.asarray(random.normal(size=(2, 3, 5)).astype(np.float32))
    p, q = (probabilities(each, sampling=Sampling(temperature=0.6)) for each in scores)
    q = q[:2]

    @jax.vmap
    def drawn(key):
        keys = jax.random.split(key)
        guesses = jax.random.categorical(keys[0], jnp.log(q))
        kept, token = verified(p, q, guesses, keys[1])
        return jnp.where(kept > 0, guesses[0], token), kept

    first, kept = drawn(jax.random.split(jax.random.key(1), 20000))
    often = np.bincount(first, minlength=5) / len(first)
    np.testing.assert_allclose(often, p[0], atol=0.015)
    overlaps = np.minimum(p[:2], q).sum(axis=-1)
    assert np.mean(kept > 0) == pytest.approx(overlaps[0], abs=0.015)
    assert np.mean(kept == 2) == pytest.approx(overlaps[0] * overlaps[1], abs=0.015)


def test_a_draft_that_is_not_ahead_is_refused(target):
    with pytest.raises(UserError, match="ahead: 0 leaves the draft nothing to say"):
        spoken(target, target, ahead=0)
