"""Learning what a teacher says: the dense formula, on any mesh, with the teacher there and with its words stored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.equivalence import assert_same, batches, tiny, trajectory
from support.run_files import losses

from meshwright.checkpoint.interop import huggingface
from meshwright.configs.errors import UserError
from meshwright.configs.huggingface import to_config_json
from meshwright.configs.loader import merge_trees
from meshwright.models.context import Context
from meshwright.models.decoder import decoder_graphdef
from meshwright.parallel.mesh import make_mesh
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.data import assemble
from meshwright.train.data.tokenizer import configured_tokenizer
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.program import build
from meshwright.train.infer import inference_session
from meshwright.train.infer.precompute_logprobs import with_reference_logprobs
from meshwright.train.objectives.distillation import init_weights
from meshwright.train.run import train

MESH = {"fsdp": 2, "tensor": 2}
LARGE = {"layers": 3, "embed": 24, "heads": 4, "kv_heads": 4, "mlp": 32, "vocab_multiple": 8}
CHEAP = {"name": "sgd", "learning_rate": 0.05, "schedule": "constant", "weight_decay": 0.0, "warmup_steps": 0}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Directories of a larger model, by its vocabulary: one for random batches, one that reads bytes."""
    root = tmp_path_factory.mktemp("teachers")
    for vocab in (61, 264):
        config = tiny(model=LARGE | {"vocab": vocab}, seed=3)
        directory = root / str(vocab)
        directory.mkdir()
        weights = jax.tree.map(lambda x: 3 * x, jax.jit(lambda config=config: init_weights(config))())
        huggingface.write(weights, config.model, directory, kind="llama", limit=10**9)
        tree = to_config_json(config.model, positions=64, dtype="float32")
        (directory / "config.json").write_text(json.dumps(tree))
        configured_tokenizer(config.data.tokenizer).save(directory)
    return root


def distilled(teachers, *, vocab=61, recipe=None, **changes):
    """A run that distills the larger model."""
    teacher = {"from": str(teachers / str(vocab)), "vocab_multiple": 8}
    own = {"name": "distill", "teacher": teacher, "temperature": 2.0, "mix": 0.7}
    base = {"recipe": own | (recipe or {}), "model": {"vocab": vocab}, "data": {"packing": {"method": "best-fit"}}}
    return tiny(**merge_trees(base, changes))


def full_logprobs(model, weights, batch, temperature):
    """log p of the whole vocabulary."""
    ctx = Context(positions=jnp.asarray(batch["positions"]), segment_ids=jnp.asarray(batch["segment_ids"]))
    decoder = nnx.merge(decoder_graphdef(model), weights)
    hidden, _ = jax.jit(lambda: decoder.hidden(jnp.asarray(batch["tokens"]), ctx))()
    scores = (hidden @ decoder.head_kernel(jnp.float32))[..., : model.vocab]
    return np.asarray(jax.nn.log_softmax(scores / temperature), np.float64)


def first_loss(config):
    """Metrics of the first step, its batch, and the state before it."""
    program = build(config, make_mesh(config.mesh))
    state, batch = program.initialize(), batches(config, 1)[0]
    with jax.set_mesh(program.mesh):
        _, metrics = jax.jit(program.step)(state, make_global_arrays(batch, config, program.mesh))
    return {name: float(value) for name, value in metrics.items()}, batch, program, state


def test_the_loss_is_that_of_the_paper(teachers):
    config = distilled(teachers, memory={"loss_chunks": 4})
    metrics, batch, program, state = first_loss(config)
    teacher = full_logprobs(config.recipe.teacher, program.teacher_weights(), batch, 2.0)
    own, plain = (full_logprobs(config.model, state.params, batch, t) for t in (2.0, 1.0))
    apart = (np.exp(teacher) * (teacher - own)).sum(-1)
    token = -np.take_along_axis(plain, batch["targets"][..., None], -1)[..., 0]
    mean = lambda x: (batch["loss_weights"] * x).sum() / batch["loss_weights"].sum()
    assert metrics["loss"] == pytest.approx(0.7 * 4 * mean(apart) + 0.3 * mean(token), rel=1e-4)
    assert metrics["divergence"] == pytest.approx(mean(apart), rel=1e-4)
    with jax.set_mesh(program.mesh):
        taken, weight = jax.jit(program.measures["acceptance"])(
            state.params, state.frozen, make_global_arrays(batch, config, program.mesh)
        )
    both = np.minimum(
        np.exp(full_logprobs(config.recipe.teacher, program.teacher_weights(), batch, 1.0)), np.exp(plain)
    )
    assert float(taken / weight) == pytest.approx(mean(both.sum(-1)), rel=1e-4)


def test_the_result_is_the_same_on_every_mesh(teachers):
    settings = {"optimizer": CHEAP, "model": {"dropout": 0.1}}
    one, cut = (distilled(teachers, **settings, **more) for more in ({}, {"mesh": MESH, "memory": {"loss_chunks": 2}}))
    assert_same(one, cut, steps=3)


@pytest.mark.slow
def test_stored_top_tokens_give_the_same_result_on_every_mesh(teachers):
    settings = {"recipe": {"top_k": 4}, "optimizer": CHEAP, "microbatches": 2}
    cut = {"mesh": {"fsdp": 2, "seq": 2, "tensor": 2}, "memory": {"loss_chunks": 2}}
    assert_same(distilled(teachers, **settings), distilled(teachers, **settings, **cut), steps=3)


PIPELINES = {
    "1f1b over tensor": ({}, {"mesh": {"pipe": 2, "tensor": 2}, "memory": {"loss_chunks": 2}}),
    "zb-v": ({}, {"mesh": {"pipe": 2}, "pipeline": {"schedule": "zb-v"}}),
    "1f1b": ({}, {"mesh": {"pipe": 2}}),
    "zb-v over tensor": ({}, {"mesh": {"pipe": 2, "tensor": 2}, "pipeline": {"schedule": "zb-v"}}),
    "stored words": ({"recipe": {"top_k": 4}}, {"mesh": {"pipe": 2, "tensor": 2}, "pipeline": {"schedule": "zb-v"}}),
    "stored words over fsdp": ({"recipe": {"top_k": 4}}, {"mesh": {"pipe": 2, "fsdp": 2}}),
    "itself, an adapter": (
        {"recipe": {"teacher": None}, "adapter": {"method": "lora", "rank": 2}, "model": {"dropout": 0.1}},
        {"mesh": {"pipe": 2, "data": 2}, "pipeline": {"schedule": "zb-v"}},
    ),
    "replicas": (
        {"mesh": {"replica": 2}, "outer": {"name": "diloco", "every": 2}, "microbatches": 2},
        {"mesh": {"pipe": 2}, "pipeline": {"schedule": "zb-v", "post_validation": False}},
    ),
}  # fmt: skip
SLOW = [pytest.param(*case, marks=[pytest.mark.slow] if place else [], id=name)
        for place, (name, case) in enumerate(PIPELINES.items())]  # fmt: skip


@pytest.mark.parametrize(("settings", "pipeline"), SLOW)
def test_the_result_is_the_same_in_a_pipeline(teachers, settings, pipeline):
    """The teacher has three layers: its stages are uneven, and not where those of the model are."""
    plain = merge_trees({"model": {"layers": 4}, "optimizer": CHEAP, "microbatches": 4}, settings)
    one, staged = distilled(teachers, **plain), distilled(teachers, **merge_trees(plain, pipeline))
    assert_same(one, staged, steps=3, tolerance=1e-5)
    told = [[metrics["divergence"] for metrics in trajectory(config, steps=3)[0]] for config in (one, staged)]
    np.testing.assert_allclose(told[0], told[1], rtol=1e-5)


@pytest.mark.slow
def test_the_divergence_from_itself_is_zero_before_the_first_step(teachers):
    """With no other, the model as it was teaches: only the next token moves it."""
    config = tiny(recipe={"name": "distill", "mix": 0.5}, optimizer=CHEAP)
    metrics, *_ = first_loss(config)
    plain, *_ = first_loss(tiny(optimizer=CHEAP))
    assert abs(metrics["divergence"]) < 1e-6
    assert metrics["loss"] == pytest.approx(plain["loss"] / 2, rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(plain["grad_norm"] / 2, rel=1e-4)


def run_of(teachers, **changes):
    logging = {"every": 1, "tensorboard": False}
    data = {"global_batch": 8, "held_out": 0.1}
    base = {"steps": 6, "optimizer": CHEAP, "logging": logging, "data": data, "checkpoint": {"every": 3}}
    return distilled(teachers, **merge_trees(base | {"vocab": 264}, changes))


@pytest.mark.slow
def test_stored_top_tokens_of_the_whole_vocabulary_equal_the_live_teacher(teachers, tmp_path):
    """All of its words, looked up, are the same run."""
    one = train(run_of(teachers), process_info=ProcessInfo(), root=tmp_path / "present")
    train(run_of(teachers, recipe={"top_k": 264}), process_info=ProcessInfo(), root=tmp_path / "stored")
    present, stored = (losses(tmp_path / name / "run") for name in ("present", "stored"))
    np.testing.assert_allclose(list(stored.values()), list(present.values()), rtol=2e-4)
    assert present[6] < present[1]
    assert 0 < one.metrics["held_out_acceptance"] < 1
    assert "held_out_acceptance" not in (tmp_path / "stored/run/metrics.jsonl").read_text()


def test_annotations_are_the_teachers_top_tokens_of_each_row(teachers):
    config = run_of(teachers, recipe={"top_k": 5})
    program = build(config, make_mesh(config.mesh))
    data = with_reference_logprobs(program, assemble.build_data(config.data, seed=0), samples=range(8))
    rows = [data.train.row(index) for index in range(4)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    said = full_logprobs(config.recipe.teacher, program.teacher_weights(), batch, 2.0)
    real = batch["token_index"] >= 0
    looked_up = np.take_along_axis(said, batch["teacher_tokens"], -1)
    np.testing.assert_allclose(batch["teacher_logprobs"][real], looked_up[real], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(looked_up[real], -np.sort(-said, -1)[..., :5][real], rtol=1e-5)


@pytest.mark.slow
def test_a_run_resumes_with_its_teacher_and_is_used_without_it(teachers, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(teachers, copy)
    whole = train(run_of(copy), process_info=ProcessInfo(), root=tmp_path)
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    rest = train(run_of(copy), process_info=ProcessInfo(), root=tmp_path)
    assert rest.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    held_out = inference_session.evaluate(tmp_path / "run", [])
    assert held_out["held_out_acceptance"] == pytest.approx(rest.metrics["held_out_acceptance"], rel=1e-4)
    config = run_of(copy)
    weights = jax.tree.map(lambda x: 1.01 * x, build(config, make_mesh(config.mesh)).teacher_weights())
    (copy / "264/model.safetensors").unlink()
    huggingface.write(weights, config.recipe.teacher, copy / "264", kind="llama", limit=10**9)
    with pytest.raises(UserError, match="holds other weights than this run was trained with"):
        train(run_of(copy, steps=8), process_info=ProcessInfo(), root=tmp_path)
    shutil.rmtree(copy)
    again = inference_session.evaluate(tmp_path / "run", [])
    assert again["held_out_loss"] == pytest.approx(held_out["held_out_loss"], rel=1e-5)
    assert "held_out_acceptance" not in again


def test_another_tokenizer_is_refused(teachers, tmp_path):
    config = run_of(teachers, data={"tokenizer": {"bytes": False, "train": "bpe", "vocab": 264}})
    with pytest.raises(UserError, match=r"recipe\.teacher\.from: .*data\.tokenizer\.file"):
        train(config, process_info=ProcessInfo(), root=tmp_path)
    with pytest.raises(UserError, match=r"recipe\.teacher\.from: not set"):
        train(
            tiny(recipe={"name": "distill", "mix": 0.5}, model={"vocab": 264}),
            process_info=ProcessInfo(),
            root=tmp_path,
        )


MISTAKES = {
    "no weights": ({"recipe": {"name": "distill", "teacher": {"layers": 2}}}, "recipe.teacher.from: null"),
    "nobody's words": ({"recipe": {"name": "distill", "top_k": 4}}, "recipe.top_k: 4 "),
    "a key of another": ({"recipe": {"temperature": 2.0}}, "recipe.temperature: 2.0 .*pretrain"),
}


@pytest.mark.parametrize(("settings", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_recipe_that_cannot_work_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        tiny(**settings)


UNFIT = {
    "other words": ({"model": {"vocab": 60}}, r"model.vocab: 60 is not the teacher's \(61\)"),
    "padded otherwise": ({"model": {"vocab_multiple": 128, "vocab": 61}, "recipe": {}}, "vocab_multiple"),
    "a shared vocabulary": (
        {"mesh": {"pipe": 2}, "microbatches": 2, "pipeline": {"vocab_parallel": 2}},
        "pipeline.vocab_parallel: 2 .* distill ",
    ),
    "routes": (
        {"mesh": {"pipe": 2, "replica": 2}, "outer": {"name": "noloco", "every": 2, "routing": True}},
        "outer.routing: true .* distill",
    ),
    "in order": ({"elastic": {"deterministic": True}}, "distill is not computed in a fixed order"),
    "cut elsewhere": (
        {"recipe": {"top_k": 4}, "data": {"packing": {"method": "concat"}}},
        "data.packing.method: concat .*best-fit or single",
    ),
    "too many": ({"recipe": {"top_k": 100}}, r"recipe.top_k: 100 exceeds model.vocab \(61\)"),
}


@pytest.mark.parametrize(("settings", "message"), UNFIT.values(), ids=UNFIT)
def test_a_teacher_that_does_not_fit_is_refused(teachers, settings, message):
    with pytest.raises(UserError, match=message):
        distilled(teachers, **settings)
