"""Generation: the cache changes no token, texts depend on prompt and key only, and sampling has its distribution."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.equivalence import tiny

from meshwright.configs.errors import UserError
from meshwright.models.context import Context
from meshwright.parallel.mesh import make_mesh
from meshwright.train.data.tokenizer import byte_tokenizer
from meshwright.train.engine.program import build
from meshwright.train.infer.generate import cast_weights, compiled_generator, generate
from meshwright.train.infer.generation_eval import complete
from meshwright.train.infer.sampling import GREEDY, Sampling, prompt_keys, sample, top_k, top_p

PROMPTS = [[5, 9, 2], [17] * 18 + [3], [60]]
YARN = {"scaling": "yarn", "factor": 4.0, "original_length": 16, "theta": 50.0}

CASES = {
    "scanned, windows and a rest": ({"layers": 5, "windows": [3, None]}, {}),
    "unrolled, windows and a rest": ({"layers": 5, "windows": [3, None], "scan": False}, {}),
    "head norms, soft-caps": ({"qk_norm": True, "attention_softcap": 0.7, "logit_softcap": 1.5}, {}),
    "learned positions": ({"family": "gpt2", "max_positions": 32, "kv_heads": 4}, {}),
    "yarn, one key head, parallel": ({"rope": YARN, "kv_heads": 1, "parallel_block": True}, {}),
    "data 2 x tensor 2": ({"layers": 5, "windows": [3, None]}, {"data": 2, "tensor": 2}),
    "fsdp 2 x seq 2 x tensor 2": ({"kv_heads": 1}, {"fsdp": 2, "seq": 2, "tensor": 2}),
}


def program_with_weights(model=None, mesh=None, **changes):
    """A program and weights far from their initial values, so that texts are varied."""
    config = tiny(model=model or {}, mesh=mesh or {}, **changes)
    program = build(config, make_mesh(config.mesh))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.4 * random.normal(size=leaf.shape).astype(np.float32), program.shapes.params)
    return program, jax.device_put(params, program.shardings.params)


@pytest.fixture(scope="module")
def model():
    return program_with_weights()


def generated(model, prompts, *, seed=0, max_tokens=8, **sampling):
    return generate(
        *model, prompts, max_tokens=max_tokens, sampling=Sampling(**sampling), eos=None, key=jax.random.key(seed)
    )


def likeliest(program, params, texts):
    """Argmax after every token of each text, [texts][tokens], without a cache and on one device."""
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text

    @jax.jit
    def forward(params):
        ctx = Context(positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        decoder = nnx.merge(program.graph, params)
        scores = decoder.hidden(tokens, ctx)[0] @ decoder.head_kernel(jnp.float32)
        return jnp.argmax(scores[..., : program.config.model.vocab], axis=-1)

    return np.asarray(forward(jax.device_get(params)))


@pytest.mark.parametrize(("model", "mesh"), CASES.values(), ids=CASES)
def test_a_greedy_text_is_the_argmax_of_the_uncached_model_at_every_step(model, mesh):
    program, params = program_with_weights(model, mesh)
    texts = generate(program, params, PROMPTS, max_tokens=7, sampling=GREEDY, eos=None, key=jax.random.key(0))
    argmax = likeliest(program, params, [p + t for p, t in zip(PROMPTS, texts, strict=True)])
    for prompt, text, row in zip(PROMPTS, texts, argmax, strict=True):
        assert text == row[len(prompt) - 1 :][:7].tolist()
    assert len({token for text in texts for token in text}) > 4, "the texts are too uniform to be a test"


def test_each_device_holds_its_own_rows_and_heads_of_the_cache():
    program, params = program_with_weights(mesh={"data": 2, "tensor": 2})
    run = compiled_generator(program.graph, program.mesh, compute="float32", max_tokens=5, sampling=GREEDY, eos=None)
    rows = (np.zeros((4, 16), np.int32), np.ones(4, np.int32), np.zeros((4, 2), np.uint32))
    with jax.set_mesh(program.mesh):
        text = run.lower(params, *rows).compile().as_text()
    assert "f32[2,2,21,1,4]" in text, "layers, rows / 2, tokens, key heads / 2, head_dim"
    assert "f32[2,4,21," not in text and "21,2,4]" not in text


def test_a_text_ends_before_eos_and_the_loop_with_the_last_text(model):
    texts = generated(model, PROMPTS, temperature=0)
    eos = texts[0][3]
    before = [text[: text.index(eos)] if eos in text else text for text in texts]
    program, params = model
    key = jax.random.key(0)
    assert generate(program, params, PROMPTS, max_tokens=8, sampling=GREEDY, eos=eos, key=key) == before
    run = compiled_generator(program.graph, program.mesh, compute="float32", max_tokens=8, sampling=GREEDY, eos=eos)
    tokens = np.zeros((3, 32), np.int32)
    tokens[0, -len(PROMPTS[0]) :] = PROMPTS[0]
    with jax.set_mesh(program.mesh):  # two rows are padding
        row = np.asarray(run(params, tokens, np.array([3, 0, 0], np.int32), np.zeros((3, 2), np.uint32)))[0]
    assert row.tolist() == [*before[0], eos] + [0] * (7 - len(before[0]))


def test_a_text_depends_on_its_prompt_and_the_key_and_not_on_its_neighbours(model):
    texts = generated(model, PROMPTS)
    assert texts == generated(model, PROMPTS)
    assert generated(model, PROMPTS[::-1]) == texts[::-1]
    assert generated(model, PROMPTS[2:]) == texts[2:], "in a batch of its own, with less padding"
    twice = generated(model, [PROMPTS[1], [7], PROMPTS[1]])
    assert twice[0] == texts[1] != twice[2], "a repeated prompt has different texts"
    assert generated(model, PROMPTS, seed=1) != texts


def test_every_step_draws_with_a_new_key(model):
    """Weights of zero make all tokens equally likely after any prefix."""
    program, params = model
    text = generated((program, jax.tree.map(jnp.zeros_like, params)), PROMPTS)
    assert all(len(set(tokens)) >= 6 for tokens in text)
    assert text == generated(program_with_weights({"logit_softcap": 1e-4}), PROMPTS), (
        "capped logits are nearly equal too"
    )


def draws(logits, sampling, count=4000):
    """Relative frequency of each token."""
    keys = jax.random.split(jax.random.key(0), count)
    tokens = sample(jnp.broadcast_to(jnp.asarray(logits), (count, len(logits))), keys, sampling=sampling)
    return np.bincount(tokens, minlength=len(logits)) / count


PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])
DRAWS = {
    "unchanged": (Sampling(), [0.1, 0.4, 0.05, 0.3, 0.15]),
    "temperature": (Sampling(temperature=0.5), PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
    "top 2": (Sampling(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
    "nucleus that ends inside a token": (Sampling(top_p=0.75), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),
    "nucleus of one": (Sampling(top_p=1e-6), [0, 1, 0, 0, 0]),
    "nucleus of all": (Sampling(top_p=1.0), PROBABILITIES),
    "nucleus of the top 2": (Sampling(top_k=2, top_p=0.5), [0, 1, 0, 0, 0]),
    "top k above the vocabulary": (Sampling(top_k=9), PROBABILITIES),
    "greedy": (GREEDY, [0, 1, 0, 0, 0]),
}


@pytest.mark.parametrize(("sampling", "wanted"), DRAWS.values(), ids=DRAWS)
def test_tokens_are_drawn_with_the_probabilities_asked_for(sampling, wanted):
    got = draws(np.log(PROBABILITIES).astype(np.float32), sampling)
    np.testing.assert_allclose(got, wanted, atol=0.03)
    assert not got[np.asarray(wanted) == 0].any()


def test_equal_logits_do_not_widen_the_mask():
    logits = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    np.testing.assert_array_equal(jnp.isfinite(top_k(logits, 2))[0], [False, True, True, False, False])
    np.testing.assert_array_equal(jnp.isfinite(top_p(logits, 0.4))[0], [False, True, True, False, False])


def test_keys_tell_prompts_apart():
    key = jax.random.key(0)
    keys = jax.random.key_data(prompt_keys(key, [[1, 2], [2, 1], [1, 2], [258], [2, 1, 0]]))
    assert len({tuple(key_data) for key_data in keys.tolist()}) == 5


REFUSED = {
    "empty": ([[1], []], 4, "prompts: number 1 has 0 tokens; begin it with the tokenizer's bos"),
    "too large an id": ([[61]], 4, "number 0 has ids from 61 to 61, but model.vocab is 61"),
    "negative": ([[-1]], 4, "number 0 has ids from -1"),
    "no tokens": ([[1]], 0, "max_tokens: 0 adds nothing"),
    "too long": ([[1] * 30], 3, r"has 30 tokens and max_tokens is 3, more than model.max_positions \(32\)"),
}


@pytest.mark.parametrize(("prompts", "max_tokens", "message"), REFUSED.values(), ids=REFUSED)
def test_a_prompt_that_cannot_be_continued_is_refused(prompts, max_tokens, message):
    model = tiny(model={"family": "gpt2", "max_positions": 32}).model
    program = SimpleNamespace(config=SimpleNamespace(model=model), mesh=None)
    with pytest.raises(UserError, match=message):
        generate(program, {}, prompts, max_tokens=max_tokens, sampling=GREEDY, eos=None, key=jax.random.key(0))


@pytest.mark.parametrize("values", [{"temperature": -0.1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
def test_a_sampling_that_leaves_nothing_to_draw_is_refused(values):
    with pytest.raises(UserError, match=f"{next(iter(values))}: {next(iter(values.values()))} "):
        Sampling(**values)


def test_weights_rounded_once_are_the_weights_rounded_at_every_use():
    program, params = program_with_weights({"norm": "layer", "qkv_bias": True, "tied_embeddings": True})
    tokens = np.array([PROMPTS[1]])

    @jax.jit
    def hidden(params):
        ctx = Context(positions=jnp.arange(tokens.shape[1])[None], compute_dtype=jnp.bfloat16)
        return nnx.merge(program.graph, params).hidden(tokens, ctx)[0]

    small = cast_weights(params, jnp.bfloat16)
    assert small["embed"]["embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(hidden(small), hidden(params))


def test_a_completion_begins_a_document_and_is_text():
    tokenizer = byte_tokenizer()
    program, params = program_with_weights({"vocab": 258})
    texts = complete(program, params, tokenizer, ["def ", ""], max_tokens=6, sampling=Sampling(), seed=3)
    ids = [[tokenizer.bos, *b"def "], [tokenizer.bos]]
    key = jax.random.key(3)
    wanted = generate(program, params, ids, max_tokens=6, sampling=Sampling(), eos=tokenizer.eos, key=key)
    assert texts == [tokenizer.decode(text) for text in wanted] and len(texts[0]) > 1
