"""Recipes, one battery over the registry: sums add up over any cut of the batch; each is its paper's equation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import random_packed_batch

from meshwright.configs.errors import UserError
from meshwright.configs.loader import validate_tree
from meshwright.configs.names import RECIPE_FIELDS
from meshwright.configs.sections.recipe import RECIPE_FORMATS, RECIPE_KEYS, REFERENCE_RECIPES, RecipeConfig
from meshwright.train.objectives.registry import RECIPES

PAIRED = [name for name, recipe in RECIPES.items() if recipe.unit != "token"]


def loss(name, **settings):
    return RECIPES[name].loss(RecipeConfig(name=name, **settings))


@pytest.fixture
def batch():
    """Packed rows with two answers, the second of one row cut away; labels are of pairs, so of whole rows here."""
    made = random_packed_batch(np.random.default_rng(0), (6, 12), vocab=9)
    made["loss_weights"] = np.where(np.arange(12) % 4 == 0, 0, np.sign(made["segment_ids"])).astype(np.float32)
    made["segment_ids"][3] = np.minimum(made["segment_ids"][3], 1)
    random = np.random.default_rng(1)
    made["labels"] = np.where(random.random((6, 1)) < 0.5, 1.0, -1.0) * (made["segment_ids"] > 0)
    made["reference_logprobs"] = -random.random((6, 12))
    return {name: jnp.asarray(field) for name, field in made.items()}


@pytest.fixture
def logprobs():
    return -jax.random.uniform(jax.random.key(0), (6, 12)) - 0.1


def test_names_are_those_of_the_schema():
    assert list(RECIPES) == list(RECIPE_KEYS)
    assert set(RECIPE_FORMATS) == set(PAIRED)
    assert {name for name, recipe in RECIPES.items() if "reference_logprobs" in recipe.extra_fields} == set(
        REFERENCE_RECIPES
    )
    assert all(set(recipe.extra_fields) <= set(RECIPE_FIELDS) for recipe in RECIPES.values())


@pytest.mark.parametrize("name", RECIPES)
def test_sums_add_up_over_any_split_of_the_batch(name, batch, logprobs):
    whole = loss(name)(logprobs, batch)
    parts = [
        loss(name)(logprobs[cut], jax.tree.map(lambda x, cut=cut: x[cut], batch)) for cut in (slice(2), slice(2, 6))
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_a_token_without_weight_has_no_effect(name, batch, logprobs):
    changed = jnp.where(batch["loss_weights"] > 0, logprobs, -7.0)
    np.testing.assert_allclose(loss(name)(changed, batch), loss(name)(logprobs, batch), rtol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_padding_rows_add_nothing_and_have_no_gradient(name, batch, logprobs):
    empty = jax.tree.map(jnp.zeros_like, batch)
    assert np.asarray(loss(name)(logprobs, empty)).tolist() == [0, 0]
    assert not jax.grad(lambda x: loss(name)(x, empty)[0])(logprobs).any()


def test_pretraining_is_the_weighted_negative_log_likelihood(batch, logprobs):
    numerator, weight = loss("pretrain")(logprobs, batch)
    weights = np.asarray(batch["loss_weights"])
    np.testing.assert_allclose(numerator, (weights * -np.asarray(logprobs)).sum(), rtol=1e-6)
    assert weight == weights.sum()


def by_hand(logprobs, batch):
    """For each pair: sums and means of log p, changes against the reference, and the label; spelt out in NumPy."""
    found = []
    fields = {name: np.asarray(field, np.float64) for name, field in batch.items()}
    for row in range(6):
        pair = []
        for segment in (1, 2):
            learned = (fields["segment_ids"][row] == segment) & (fields["loss_weights"][row] > 0)
            own, reference = np.asarray(logprobs, np.float64)[row, learned], fields["reference_logprobs"][row, learned]
            pair.append((own.sum(), len(own), own.sum() - reference.sum()))
        if all(tokens for _, tokens, _ in pair):
            found.append((*pair, fields["labels"][row, 0]))
    assert len(found) == 5, "one row has no pair"
    return found


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def odds(mean):
    return np.log(np.exp(mean) / (1 - np.exp(mean)))


def kto(better, worse, label, *, beta=0.1, good=1.0, bad=1.0):
    """The row's only pair: the second is the answer to another question."""
    moved = max(0, worse[2])
    return (
        good * (1 - sigmoid(beta * (better[2] - moved)))
        if label > 0
        else bad * (1 - sigmoid(beta * (moved - better[2])))
    )


# (sum, tokens, change) of the better and of the worse answer, label -> loss
EQUATIONS = {
    "dpo": ({}, lambda w, r, y: -np.log(sigmoid(0.1 * (w[2] - r[2])))),
    "dpo, sharper": ({"beta": 0.5}, lambda w, r, y: -np.log(sigmoid(0.5 * (w[2] - r[2])))),
    "ipo": ({}, lambda w, r, y: (w[2] / w[1] - r[2] / r[1] - 1 / (2 * 0.1)) ** 2),
    "orpo": (
        {"beta": 0.3},
        lambda w, r, y: -w[0] / w[1] - 0.3 * np.log(sigmoid(odds(w[0] / w[1]) - odds(r[0] / r[1]))),
    ),
    "simpo": ({"margin": 0.5}, lambda w, r, y: -np.log(sigmoid(2.0 * (w[0] / w[1] - r[0] / r[1]) - 0.5))),
    "kto": ({}, kto),
    "kto, weighted": (
        {"desirable": 1.5, "undesirable": 0.5, "beta": 0.4},
        lambda w, r, y: kto(w, r, y, beta=0.4, good=1.5, bad=0.5),
    ),
}


@pytest.mark.parametrize("case", EQUATIONS)
def test_a_comparison_is_its_papers_equation(case, batch, logprobs):
    settings, equation = EQUATIONS[case]
    numerator, weight = loss(case.split(",")[0], **settings)(logprobs, batch)
    pairs = by_hand(logprobs, batch)
    np.testing.assert_allclose(numerator, sum(equation(*pair) for pair in pairs), rtol=1e-5)
    assert weight == len(pairs)


def test_every_comparison_has_an_equation():
    assert {case.split(",")[0] for case in EQUATIONS} | {"reward"} == set(PAIRED)


# A model that has not moved cannot prefer anything: what each loss is then.
UNMOVED = {"dpo": np.log(2), "ipo": 1 / (4 * 0.1**2), "kto": 0.5}


@pytest.mark.parametrize("name", UNMOVED)
def test_before_the_first_step_the_loss_is_known(name, batch):
    numerator, weight = loss(name)(batch["reference_logprobs"], batch)
    np.testing.assert_allclose(numerator / weight, UNMOVED[name], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in PAIRED if name not in ("kto", "reward")])
def test_a_gradient_step_increases_the_margin(name, batch, logprobs):
    gradient = jax.grad(lambda x: loss(name)(x, batch)[0])(logprobs)
    learned = (batch["loss_weights"] > 0) & (batch["segment_ids"].max(axis=1, keepdims=True) == 2)
    better, worse = (np.asarray(gradient)[np.asarray(learned & (batch["segment_ids"] == n))] for n in (1, 2))
    assert (better < 0).all() and (worse > 0).all()


def test_responses_to_other_questions_have_no_gradient(batch, logprobs):
    gradient = jax.grad(lambda x: loss("kto")(x, batch)[0])(logprobs)
    assert gradient[batch["segment_ids"] == 1].any() and not gradient[batch["segment_ids"] == 2].any()


MISTAKES = {
    "a key of another": ({"recipe": {"name": "sft", "beta": 1.0}}, "recipe.beta: 1.0 .*sft.*dpo or ipo"),
    "no pairs": ({"recipe": {"name": "dpo"}}, "data.format: text.*dpo.* pref"),
    "pairs, read": (
        {"data": {"source": "jsonl", "path": "x", "format": "unpaired", "packing": {"method": "single"}}},
        "recipe.name: pretrain does not compare answers.*set it to kto",
    ),
    "a score, written": (
        {
            "recipe": {"name": "reward"},
            "data": {"source": "docstrings", "format": "preference"},
            "evaluation": {"prompts": ["a"]},
        },
        "evaluation.prompts: recipe.name reward|data.packing.method",
    ),
    "no answers": ({"recipe": {"name": "sft"}}, "data.format: text without data.prompt"),
}


@pytest.mark.parametrize(("tree", "message"), MISTAKES.values(), ids=MISTAKES)
def test_recipe_and_data_that_do_not_fit_are_refused(tree, message):
    with pytest.raises(UserError, match=message):
        validate_tree(tree)


def test_a_reward_is_read_at_the_last_weighted_token(batch, logprobs):
    """Whatever order a mesh holds the tokens in."""
    scores, fields = np.asarray(logprobs, np.float64), {name: np.asarray(field) for name, field in batch.items()}
    found, right = [], 0
    for row in range(6):
        ends = [np.flatnonzero((fields["segment_ids"][row] == n) & (fields["loss_weights"][row] > 0)) for n in (1, 2)]
        if all(map(len, ends)):
            ahead = scores[row, ends[0][-1]] - scores[row, ends[1][-1]]
            found.append(-np.log(sigmoid(ahead - fields["labels"][row, 0])))
            right += ahead > 0
    np.testing.assert_allclose(loss("reward")(logprobs, batch), [sum(found), len(found)], rtol=1e-5)
    measure = RECIPES["reward"].measures["accuracy"]
    np.testing.assert_allclose(measure(logprobs, batch), [right, len(found)])
    order = np.random.default_rng(0).permutation(12)
    moved = jax.tree.map(lambda x: x[:, order], batch)
    np.testing.assert_allclose(loss("reward")(logprobs[:, order], moved), loss("reward")(logprobs, batch), rtol=1e-6)
