"""Differential privacy: norms without gradients are the norms of gradients; clipping, noise and what it all costs."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.equivalence import assert_same, batches, tiny
from support.run_files import metric_rows

from meshwright.configs.errors import UserError
from meshwright.configs.loader import merge_trees
from meshwright.configs.sections.privacy import PrivacyConfig
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.prng import init_key, step_key
from meshwright.train.core.event_log import EventLog
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.engine.block_context import local_context, make_context
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.privacy.dp_sgd import make_squared_norms, row_losses
from meshwright.train.engine.program import build
from meshwright.train.metrics import metrics_logger
from meshwright.train.objectives.loss_heads import target_logprobs, values_fn
from meshwright.train.objectives.registry import RECIPES
from meshwright.train.run import load_checked_data, train

pytest.importorskip("jax_privacy")

SINGLE = {"packing": {"method": "single"}}
SEED = 5077342164932151
PRIVATE = {"seed": SEED, "privacy": {"clip": 0.5, "noise": 1.0}, "data": SINGLE, "optimizer": {"name": "sgd"}}
MODELS = {
    "llama, all of it": {},
    "biases, norms, windows": {
        "model": {"qkv_bias": True, "linear_bias": True, "qk_norm": True, "windows": [4, None], "norm": "layer"}
    },
    "gpt2, untied": {"model": {"family": "gpt2", "tied_embeddings": False, "kv_heads": 4}},
    "lora, dropout": {"adapter": {"rank": 3, "dropout": 0.2}, "model": {"dropout": 0.1}},
    "lora, the last layer, tied": {"adapter": {"rank": 3, "layers": 1}, "model": {"tied_embeddings": True}},
    "dora": {"adapter": {"method": "dora", "rank": 3}},
    "ia3": {"adapter": {"method": "ia3"}},
    "norms": {"adapter": {"method": "norms"}},
    "bitfit": {"adapter": {"method": "bitfit"}, "model": {"qkv_bias": True}},
    "kernels and norms by name": {"adapter": {"method": "selective", "targets": ["*/q/*", "*norm*"]}},
    "a quantized base": {"adapter": {"rank": 3}, "quantization": {"group": 8}, "model": {"mlp": 32}},
    "remat, scanned": {"memory": {"policy": "minimal"}},
    "long rows, unrolled": {"data": {"sequence_length": 64}, "model": {"scan": False}},
    "dpo": {"recipe": {"name": "dpo"}, "data": {"source": "docstrings", "format": "preference"}},
}
FAST = ("llama, all of it", "lora, dropout")


def private(**changes):
    return tiny(**merge_trees(PRIVATE, changes))


def with_noise(params):
    """Weights away from a symmetric start, because zeros would hide missing terms."""
    random = np.random.default_rng(5)
    return jax.tree.map(lambda x: x + jnp.asarray(0.05 * random.standard_normal(x.shape), x.dtype), params)


def materialised(config, program, params, frozen, batch, keys):
    """The gradient of each row, computed in full."""
    values = values_fn(
        target_logprobs(config.model, config.memory), program.graph, context=partial(make_context, config, program.mesh)
    )
    recipe = RECIPES[config.recipe.name].loss(config.recipe)

    def loss(params, row, key):
        row = jax.tree.map(lambda x: x[None], row)
        return row_losses(recipe, values(params, frozen, row, None if key is None else key[None]), row)[0]

    return jax.vmap(jax.grad(loss), (None, 0, None if keys is None else 0))(params, batch, keys)


def norms_of(config, program):
    return make_squared_norms(
        program.graph,
        RECIPES[config.recipe.name].loss(config.recipe),
        model=config.model,
        adapter=config.adapter,
        context=partial(local_context, config, program.mesh),
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in MODELS]
)
def test_norms_are_those_of_the_gradients_of_each_row(name):
    config = private(**MODELS[name])
    program = build(config, make_mesh(config.mesh))
    state = program.initialize()
    params, batch = with_noise(state.params), jax.tree.map(jnp.asarray, batches(config, 1)[0])
    keys = jax.random.split(jax.random.key(3), config.data.global_batch)
    with jax.set_mesh(program.mesh):
        found = jax.jit(norms_of(config, program))(params, state.frozen, batch, keys)
        each = jax.jit(partial(materialised, config, program))(params, state.frozen, batch, keys)
    wanted = sum(
        np.square(np.asarray(leaf, np.float64)).reshape(leaf.shape[0], -1).sum(1) for leaf in jax.tree.leaves(each)
    )
    assert (wanted > 0).all()
    np.testing.assert_allclose(np.sqrt(found), np.sqrt(wanted), rtol=1e-5)


def summed(config):
    """The sums of one batch, and every row's own gradient."""
    program = build(config, make_mesh(config.mesh))
    state, batch = program.initialize(), batches(config, 1)[0]
    with jax.set_mesh(program.mesh):
        placed = make_global_arrays(batch, config, program.mesh)
        sums = jax.jit(program.gradient_engine)(state.params, state.frozen, placed, None)
        each = jax.jit(partial(materialised, config, program))(state.params, state.frozen, placed, None)
    return sums, each


def row_norms(row_gradients):
    rows = [np.asarray(leaf, np.float64).reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(row_gradients)]
    return rows, np.sqrt(sum(np.square(leaf).sum(1) for leaf in rows))


def test_no_row_counts_for_more_than_the_clip():
    clip = float(np.median(row_norms(summed(private())[1])[1]))
    sums, each = summed(private(privacy={"clip": clip}))
    rows, norms = row_norms(each)
    scale = np.minimum(1, clip / norms)
    for leaf, found in zip(rows, jax.tree.leaves(sums.gradient), strict=True):
        np.testing.assert_allclose(np.asarray(found).reshape(-1), scale @ leaf, rtol=1e-4, atol=1e-4)
    assert float(sums.weight) == len(norms)
    assert float(sums.metrics["clipped"]) == len(norms) / 2
    assert float(sums.metrics["row_norm"]) == pytest.approx(norms.sum(), rel=1e-5)


def test_a_row_without_a_finite_norm_counts_as_an_empty_one():
    """A word that no other row reads has an embedding that is not a number: the others' gradients are as without it."""
    config = private()
    program = build(config, make_mesh(config.mesh))
    params, batch = program.initialize().params, batches(config, 1)[0]
    word = config.model.vocab - 1
    batch["tokens"][batch["tokens"] == word] = 1
    without = batch | {"loss_weights": batch["loss_weights"] * (np.arange(8) > 0)[:, None]}
    batch["tokens"][0, 0] = word
    broken = jax.tree.map(jnp.asarray, params)
    broken["embed"]["embedding"] = params["embed"]["embedding"].at[word].set(jnp.nan)
    with jax.set_mesh(program.mesh):
        engine = jax.jit(program.gradient_engine)
        found = engine(broken, {}, make_global_arrays(batch, config, program.mesh), None)
        wanted = engine(params, {}, make_global_arrays(without, config, program.mesh), None)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), found.gradient, wanted.gradient)
    assert np.abs(found.gradient["head"]["kernel"]).max() > 0.001
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-5)
    assert float(found.weight) == 8
    assert float(found.metrics["clipped"]) == float(wanted.metrics["clipped"]) + 1


def test_the_noise_uses_the_whole_seed_and_the_run_directory_does_not_reveal_it():
    """`jax.random.key` reads the lower half of a seed: the keys are of all of it, and none is another's."""
    keys = {}
    for seed in (SEED, SEED + 2**32):
        config = private(seed=seed)
        keys |= {(seed, key): tuple(np.asarray(jax.random.key_data(key(config)))) for key in (init_key, step_key)}
    low = jax.random.key(SEED)
    seen = {*keys.values(), *(tuple(np.asarray(jax.random.key_data(key))) for key in (low, jax.random.fold_in(low, 1)))}
    assert len(seen) == 6
    state = build(config, make_mesh(config.mesh)).initialize()
    assert tuple(np.asarray(state.rng)) == keys[SEED + 2**32, step_key]


def stepping(noise):
    """A step of plain descent with `noise`, its state and its batch."""
    sgd = {"name": "sgd", "learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0, "clip": None}
    config = private(optimizer=sgd | {"weight_decay": 0.0, "b1": 0.0}, privacy={"noise": noise})
    program = build(config, make_mesh(config.mesh))
    with jax.set_mesh(program.mesh):
        batch = make_global_arrays(batches(config, 1)[0], config, program.mesh)
        step = jax.jit(lambda state: program.step(state, batch)[0].params)

    def run(state):
        with jax.set_mesh(program.mesh):
            return step(state)

    return program.initialize(), run


def test_noise_has_the_standard_deviation_that_is_accounted_for():
    """And is drawn anew in each step, the same when the step is taken again."""
    state, loud = stepping(3.0)
    _, quiet = stepping(1e-9)
    first, without, again = loud(state), quiet(state), loud(state)
    noise = jax.tree.map(lambda x, y: np.asarray(x - y).reshape(-1), first, without)
    noise = np.concatenate(jax.tree.leaves(noise))
    assert noise.std() == pytest.approx(3.0 * 0.5 / 8, rel=0.03) and abs(noise.mean()) < 0.01
    jax.tree.map(np.testing.assert_array_equal, again, first)
    later = loud(dataclasses.replace(state, step=state.step + 1))
    assert np.abs(np.asarray(first["head"]["kernel"] - later["head"]["kernel"])).max() > 0.1


@pytest.mark.slow
def test_the_result_is_the_same_on_every_mesh_and_in_microbatches():
    settings = {"model": {"dropout": 0.1}}
    cut = {"mesh": {"data": 2, "fsdp": 2}, "microbatches": 2}
    assert_same(private(**settings), private(**settings, **cut), steps=2)


def test_norms_need_less_memory_than_row_gradients():
    config = private(model={"embed": 128, "mlp": 512, "heads": 4}, data={"global_batch": 16})
    program = build(config, make_mesh(config.mesh))
    with jax.set_mesh(program.mesh):
        shapes = (program.shapes.params, program.shapes.frozen, program.batch_shapes, None)

        def temporary(function):
            return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

        def norms_of_gradients(*inputs):
            gradients = materialised(config, program, *inputs)
            return sum(jnp.square(leaf).reshape(leaf.shape[0], -1).sum(1) for leaf in jax.tree.leaves(gradients))

        usual = build(config.model_copy(update={"privacy": None}), program.mesh).gradient_engine
        ghost, full, plain = (temporary(f) for f in (norms_of(config, program), norms_of_gradients, usual))
    assert ghost < 0.3 * full and ghost < 1.5 * plain


MISTAKES = {
    "both": ({"privacy": {"epsilon": 1.0}}, "privacy.noise: .*epsilon"),
    "packed": ({"data": {"packing": {"method": "concat"}}}, "must hold one document: use single"),
    "tied": ({"model": {"tied_embeddings": True}}, "used twice"),
    "not a map": ({"adapter": {"method": "vera"}}, "adapter.method: vera with privacy"),
    "rounded sums": ({"precision": {"gradients": "bfloat16"}}, "precision.gradients: bfloat16 with privacy"),
    "rounded weights": ({"precision": {"parameters": "bfloat16"}}, "precision.parameters: bfloat16 with privacy"),
    "rounded norms": ({"precision": {"parameters": "bfloat16"}, "adapter": {"method": "norms"}}, "or lora, dora, ia3"),
    "cut": ({"mesh": {"tensor": 2}}, "mesh.tensor: 2 with privacy"),
    "another's": ({"recipe": {"name": "reward"}, "data": {"source": "docstrings", "format": "preference"}},
                  "recipe.name: reward with privacy"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_configuration_that_breaks_privacy_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        private(**changes)


def test_a_quantized_base_trains_adapters_in_float32():
    config = private(precision={"parameters": "bfloat16"}, adapter={"rank": 3})
    shapes = build(config, make_mesh(config.mesh)).shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes.params)} == {np.dtype("float32")}


def run_of(directory, **changes):
    """A run on a corpus of 40 rows."""
    rows = [json.dumps({"text": f"row {n} " * (1 + n % 5)}) for n in range(50)]
    (directory / "rows.jsonl").write_text("\n".join(rows))
    data = {"source": "jsonl", "path": str(directory / "rows.jsonl"), "held_out": 0.2, "sequence_length": 48}
    base = {"model": {"vocab": 264}, "data": data, "logging": {"every": 1, "tensorboard": False}, "steps": 6}
    return private(**merge_trees(base, changes))


@pytest.mark.slow
def test_a_run_reports_its_epsilon_and_resumes_counting(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path / "cache"))
    budget = {"privacy": {"noise": None, "epsilon": 5.0}, "checkpoint": {"every": 3}}
    whole = train(run_of(tmp_path, **budget), process_info=ProcessInfo(), root=tmp_path)
    assert 4.99 < whole.metrics["epsilon"] <= 5.0
    epsilons = [row["epsilon"] for row in metric_rows(tmp_path / "run") if "epsilon" in row]
    assert len(epsilons) == 6 and 0 < epsilons[0] < epsilons[5]
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    again = train(run_of(tmp_path, **budget), process_info=ProcessInfo(), root=tmp_path)
    assert again.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    assert again.metrics["epsilon"] == whole.metrics["epsilon"]


def test_a_guessable_seed_and_a_tokenizer_trained_on_private_data_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="seed: 4294967295 with privacy: whoever knows or guesses the seed"):
        train(run_of(tmp_path, seed=2**32 - 1), process_info=ProcessInfo(), root=tmp_path)
    words = {"tokenizer": {"bytes": False, "train": "bpe", "vocab": 260}}
    with pytest.raises(UserError, match=r"data\.tokenizer\.train: bpe"):
        train(run_of(tmp_path, data=words), process_info=ProcessInfo(), root=tmp_path)


def test_no_batch_contains_a_row_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path / "cache"))
    config = run_of(tmp_path, data={"global_batch": 16})
    data, _ = load_checked_data(config, ProcessInfo())
    assert data.summary["rows"] % 16 and data.train.rows_per_epoch() == data.summary["rows"] // 16 * 16
    for first in range(0, 10 * 16, 16):
        assert len({data.train.row(index)["tokens"].tobytes() for index in range(first, first + 16)}) == 16
    with pytest.raises(UserError, match=r"data\.global_batch: 64 with privacy: there are"):
        train(run_of(tmp_path, data={"global_batch": 64}), process_info=ProcessInfo(), root=tmp_path)


def test_other_machines_do_not_get_the_seed(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(metrics_logger, "open_sinks", lambda *_, config, **settings: sent.append(config) or [])
    for config in (private(), private(privacy=None)):
        with metrics_logger.MetricsLogger(config, tmp_path, EventLog(tmp_path, enabled=True), start=0):
            pass
    assert "seed" not in sent[0] and sent[1]["seed"] == SEED


def test_a_privacy_section_needs_noise_or_epsilon():
    with pytest.raises(ValueError, match=r"privacy\.noise: .*epsilon"):
        PrivacyConfig()
