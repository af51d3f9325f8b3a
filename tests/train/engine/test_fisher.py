"""Squared gradients of single examples: those of a loop that makes each gradient, of each example by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import assert_close, batches, tiny

from meshwright.configs.errors import UserError
from meshwright.parallel.layout import to_canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.program import build

SEARCH = {"method": "fishmask", "scouting": 2, "density": 0.1}
ALL = {"adapter": SEARCH, "model": {"layers": 1, "tied_embeddings": True, "qkv_bias": True}}
PAIRS = {"source": "jsonl", "path": "x.jsonl", "packing": {"method": "best-fit"}}
CASES = {
    "documents": ({"microbatches": 2}, 1),
    "answers": ({"recipe": {"name": "dpo"}, "data": PAIRS | {"format": "preference"}}, 2),
    "in a fixed order": ({"elastic": {"deterministic": True}, "microbatches": 2}, 1),
}
SLOW = {"in a fixed order"}
ROWS = [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()]


def cut_out(row, number, segments):
    """Example `number` of a row, alone at the beginning of a row."""
    inside = (row["segment_ids"] + segments - 1) // segments == number
    count = inside.sum()
    own = {name: np.zeros_like(field)[None] for name, field in row.items()}
    for name, field in row.items():
        own[name][0, :count] = field[inside]
    own["segment_ids"][0, :count] -= segments * (number - 1)
    return own


def gradients_of(config):
    """sums(params, batch) of the engine of whole batches."""
    program = build(config, make_mesh(config.mesh))
    run = jax.jit(lambda params, batch: program.gradient_engine(params, {}, batch, None))

    def sums(params, batch):
        with jax.set_mesh(program.mesh):
            return run(params, batch)

    return sums


@pytest.mark.parametrize(("changes", "segments"), ROWS)
def test_the_score_is_the_sum_of_each_examples_squared_gradient(changes, segments):
    """Documents are cut out of their rows, so that nothing of the others is there; weights are used twice."""
    config = tiny(**ALL, **changes)
    program = build(config, make_mesh(config.mesh))
    state, step = program.initialize(), program.compiled_step()
    engine = gradients_of(tiny(**ALL, **{key: changes[key] for key in changes.keys() & {"recipe", "data"}}))
    start = jax.tree.map(jnp.copy, state.params)
    by_example, by_batch = ([jax.tree.map(jnp.zeros_like, start)] for _ in range(2))
    for batch in batches(config, 2):
        state, metrics = step(state, make_global_arrays(batch, config, program.mesh))
        sums = engine(start, batch)
        assert metrics["loss"] == pytest.approx(float(sums.loss / sums.weight), rel=1e-5)
        by_batch.append(jax.tree.map(jnp.square, sums.gradient))
        for row in range(config.data.global_batch):
            for number in (1, 2)[: 2 // segments]:
                own = cut_out({name: field[row] for name, field in batch.items()}, number, segments)
                by_example.append(jax.tree.map(jnp.square, engine(start, own).gradient))
    found = to_canonical(jax.device_get(state.opt_state["elements"].score), config.model)
    wanted, other = (
        to_canonical(jax.tree.map(lambda *each: sum(each), *trees), config.model) for trees in (by_example, by_batch)
    )
    assert_close(found, wanted, tolerance=1e-5)
    with pytest.raises(AssertionError):  # which is what it is not
        assert_close(found, other, tolerance=1e-2)


@pytest.mark.slow
def test_a_reward_head_trains_by_its_gradient_during_the_search():
    """What a recipe adds of its own is not chosen among: it moves as it does beside a lottery."""
    moved = []
    for method in ("fishmask", "lottery"):
        settings = {
            "recipe": {"name": "reward"},
            "data": PAIRS | {"format": "preference"},
            "optimizer": {"name": "sgd", "b1": 0.0, "clip": None},
        }
        config = tiny(adapter=SEARCH | {"method": method}, **settings)
        program = build(config, make_mesh(config.mesh))
        state, batch = program.initialize(), make_global_arrays(batches(config, 1)[0], config, program.mesh)
        before = np.asarray(state.params["score"]["kernel"])
        state, _ = program.compiled_step()(state, batch)
        moved.append(np.asarray(state.params["score"]["kernel"]) - before)
    assert np.abs(moved[0]).max() > 0
    np.testing.assert_allclose(*moved, atol=1e-6 * np.abs(moved[0]).max())


MISTAKES = {
    "a pipeline": ({"mesh": {"pipe": 2}}, "mesh.pipe: 2, but adapter.method fishmask needs gradients of one example"),
    "kto": (
        {"recipe": {"name": "kto"}, "data": PAIRS | {"format": "unpaired"}},
        "recipe.name: kto .*fishmask",
    ),
}


@pytest.mark.parametrize(("changes", "error"), MISTAKES.values(), ids=MISTAKES)
def test_settings_without_single_examples_are_refused(changes, error):
    with pytest.raises(UserError, match=error):
        tiny(adapter=SEARCH, **changes)
