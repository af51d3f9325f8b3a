"""A reward model: the same on every mesh, better at telling answers apart after training, and one that others load."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file
from support.equivalence import assert_same, tiny, trajectory

from meshwright.configs.errors import UserError
from meshwright.configs.loader import merge_trees
from meshwright.parallel.mesh import make_mesh
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.engine.program import build
from meshwright.train.infer.import_export import export_adapter, export_run
from meshwright.train.run import train

PAIRS = {"source": "docstrings", "format": "preference", "packing": {"method": "best-fit"}}
REWARD = {"recipe": {"name": "reward"}, "data": PAIRS, "optimizer": {"name": "sgd"}}


@pytest.mark.slow
def test_the_result_is_the_same_on_every_mesh():
    assert_same(tiny(**REWARD), tiny(**REWARD, mesh={"fsdp": 2, "seq": 2, "tensor": 2}), steps=2)


@pytest.mark.slow
def test_an_adapter_in_microbatches_gives_the_same_result_on_every_mesh():
    settings = REWARD | {"adapter": {"rank": 2}}
    assert_same(tiny(**settings), tiny(**settings, mesh={"data": 2, "tensor": 2}, microbatches=2), steps=2)


def run_of(directory, **changes):
    """Better answers say yes."""
    pairs = [{"prompt": f"{n}?", "chosen": " yes" * (1 + n % 3), "rejected": " no" * (1 + n % 4)} for n in range(80)]
    (directory / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    data = {"source": "jsonl", "path": str(directory / "pairs.jsonl"), "format": "preference"}
    data |= {"packing": {"method": "best-fit"}, "sequence_length": 48, "global_batch": 4, "held_out": 0.2}
    base = {"recipe": {"name": "reward"}, "steps": 30, "model": {"vocab": 264}, "data": data}
    learning = {"learning_rate": 0.02, "schedule": "constant", "weight_decay": 0.0}
    return tiny(**merge_trees(base | {"optimizer": learning, "logging": {"every": 1, "tensorboard": False}}, changes))


def test_a_reward_model_learns_the_preference_and_loads_in_transformers(tmp_path):
    summary = train(run_of(tmp_path, evaluation={"start": True}), process_info=ProcessInfo(), root=tmp_path)
    assert summary.initial_metrics["held_out_accuracy"] < 0.9 < summary.metrics["held_out_accuracy"]
    assert summary.metrics["loss"] < 0.5 * np.log(2)
    export_run(tmp_path / "run", tmp_path / "out", limit=10**9)
    tree, weights = (
        json.loads((tmp_path / "out/config.json").read_text()),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert tree["architectures"] == ["LlamaForSequenceClassification"] and len(tree["id2label"]) == 1
    assert weights["score.weight"].shape == (1, 16) and "lm_head.weight" not in weights


@pytest.mark.slow
def test_an_adapter_with_a_reward_head_is_exported_merged_only(tmp_path):
    train(run_of(tmp_path, steps=2, adapter={"rank": 2}), process_info=ProcessInfo(), root=tmp_path)
    with pytest.raises(UserError, match=r"recipe.name: reward .*checkpoint export"):
        export_adapter(tmp_path / "run", tmp_path / "adapter")
    export_run(tmp_path / "run", tmp_path / "out", limit=10**9)
    assert "score.weight" in load_file(tmp_path / "out/model.safetensors")


CHOICES = {
    "selective": {"method": "selective", "layers": 1},
    "norms": {"method": "norms", "targets": ["layers/*"]},
    "fishmask": {"method": "fishmask", "density": 0.05, "scouting": 1},
    "fishmask of some": {"method": "fishmask", "density": 0.05, "scouting": 1, "targets": ["mlp/*"]},
    "lottery": {"method": "lottery", "density": 0.05, "scouting": 1},
}


@pytest.mark.parametrize("adapter", CHOICES.values(), ids=CHOICES)
def test_the_reward_head_is_trained_whatever_the_adapter_selects(adapter):
    """All of it, though its gradient is the smallest, and in no element's place."""
    config = tiny(**merge_trees(REWARD, {"adapter": adapter, "optimizer": {"warmup_steps": 0}}), steps=4)
    program = build(config, make_mesh(config.mesh))

    @jax.jit
    def second():
        params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), program.shapes.params)
        gradient = optax.tree.random_like(jax.random.key(0), params)
        gradient["score"]["kernel"] = jnp.full((16, 1), 1e-6)
        _, state = program.optimizer.update(gradient, program.optimizer.init(params), params)
        return program.optimizer.update(gradient, state, params)[0]

    updates = jax.device_get(second())
    assert np.all(updates.pop("score")["kernel"])
    if "density" in adapter:
        others = jax.tree.leaves(updates)
        assert sum(map(np.count_nonzero, others)) == round(0.05 * sum(map(np.size, others)))


PIPELINES = {
    "1f1b over tensor": {"mesh": {"pipe": 2, "tensor": 2}},
    "zb-v": {"mesh": {"pipe": 2}, "pipeline": {"schedule": "zb-v"}},
    "1f1b": {"mesh": {"pipe": 2}},
    "zb-v over tensor": {"mesh": {"pipe": 2, "tensor": 2}, "pipeline": {"schedule": "zb-v"}},
}
SLOW = [pytest.param(case, marks=[pytest.mark.slow] if place else [], id=name)
        for place, (name, case) in enumerate(PIPELINES.items())]  # fmt: skip


@pytest.mark.parametrize("pipeline", SLOW)
def test_the_result_is_the_same_in_a_pipeline(pipeline):
    plain = merge_trees(REWARD, {"model": {"layers": 4}, "microbatches": 4})
    one, staged = tiny(**plain), tiny(**merge_trees(plain, pipeline))
    assert_same(one, staged, steps=3, tolerance=1e-5)
    told = [[float(metrics["accuracy"]) for metrics in trajectory(config, steps=3)[0]] for config in (one, staged)]
    assert told[0] == pytest.approx(told[1]) and any(told[0])


@pytest.mark.slow
def test_held_out_accuracy_is_the_same_in_a_pipeline(tmp_path):
    base = {"steps": 2, "model": {"layers": 4}, "microbatches": 2, "evaluation": {"start": True}}
    one = train(run_of(tmp_path, **base), process_info=ProcessInfo(), root=tmp_path / "one")
    staged = train(run_of(tmp_path, **base, mesh={"pipe": 2}), process_info=ProcessInfo(), root=tmp_path / "staged")
    for name in ("held_out_accuracy", "held_out_loss"):
        assert staged.initial_metrics[name] == pytest.approx(one.initial_metrics[name], rel=1e-4)
    export_run(tmp_path / "staged/run", tmp_path / "out", limit=10**9)
    assert "score.weight" in load_file(tmp_path / "out/model.safetensors")


def test_a_shared_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"pipeline.vocab_parallel: 2 .*recipe.name reward"):
        tiny(**merge_trees(REWARD, {"mesh": {"pipe": 2}, "microbatches": 2, "pipeline": {"vocab_parallel": 2}}))
