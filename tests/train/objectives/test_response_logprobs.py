"""Recipes on real rows: packing changes no example, a mesh nothing, and the reference is the model at step 0."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from support.equivalence import assert_same, tiny
from support.interrupted_run import train_until_stopped
from support.run_files import losses, metric_rows

from meshwright.checkpoint.interop import huggingface
from meshwright.configs.errors import UserError
from meshwright.configs.huggingface import to_config_json
from meshwright.configs.loader import merge_trees
from meshwright.configs.sections.data import DataConfig
from meshwright.parallel.mesh import make_mesh
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.data import assemble
from meshwright.train.data.token_annotations import AnnotatedDataset, store_annotations, unannotated_batches
from meshwright.train.engine.block_context import make_context
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.program import build
from meshwright.train.infer import inference_session
from meshwright.train.infer.precompute_logprobs import initial_annotator, with_reference_logprobs
from meshwright.train.objectives.distillation import init_weights
from meshwright.train.objectives.loss_heads import target_logprobs, values_fn
from meshwright.train.run import train

PAIRED = {"source": "docstrings", "format": "preference", "packing": {"method": "best-fit"}}
UNPAIRED = PAIRED | {"format": "unpaired"}
SEQ = {"fsdp": 2, "seq": 2, "tensor": 2}


MESHES = {
    "dpo over fsdp, a zigzag sequence and tensor": ({"recipe": {"name": "dpo"}, "data": PAIRED}, {"mesh": SEQ}),
    "kto in microbatches": ({"recipe": {"name": "kto"}, "data": UNPAIRED}, {"mesh": {"data": 4}, "microbatches": 2}),
    "orpo through a pipeline, a shared vocabulary": (
        {"recipe": {"name": "orpo"}, "data": PAIRED | {"global_batch": 16}, "microbatches": 4},
        {"mesh": {"pipe": 2, "tensor": 2}, "pipeline": {"schedule": "1f1b", "vocab_parallel": 2}},
    ),
}


@pytest.mark.parametrize(("settings", "changes"), MESHES.values(), ids=MESHES)
def test_the_result_is_the_same_on_every_mesh(settings, changes):
    settings = merge_trees(settings, {"optimizer": {"name": "sgd"}})
    assert_same(tiny(**settings), tiny(**merge_trees(settings, changes)), steps=2)


def written(directory, count=24):
    """Pairs of uneven length."""
    rows = []
    for n in range(count):
        chosen = f" {n}" * (1 + n % 3)
        answers = {"chosen": chosen, "rejected": "c" * (2 + n % 7), "completion": chosen, "label": n % 3 > 0}
        rows.append({"prompt": "ab" * (n % 5) + "?"} | answers)
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"source": "jsonl", "path": str(directory / "rows.jsonl"), "tokenizer": {"bytes": True}}


def run_of(directory, name, **changes):
    """A run of five steps of recipe `name` on the pairs."""
    formats = {"kto": "unpaired", "sft": "prompt-completion"}
    data = written(directory) | {"format": formats.get(name, "preference"), "packing": {"method": "best-fit"}}
    base = {
        "steps": 5,
        "recipe": {"name": name},
        "model": {"vocab": 264},
        "data": data | {"sequence_length": 48, "global_batch": 4, "held_out": 0.2},
        "optimizer": {"learning_rate": 0.01},
        "logging": {"every": 1, "tensorboard": False},
    }
    return tiny(**merge_trees(base, changes))


def written_base(directory, *, scale):
    """A Hugging Face directory of the runs' model, its weights multiplied."""
    config = tiny(model={"vocab": 264})
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").unlink(missing_ok=True)
    weights = jax.tree.map(lambda leaf: scale * leaf, jax.jit(lambda: init_weights(config))())
    huggingface.write(weights, config.model, directory, kind="llama", limit=10**9)
    (directory / "config.json").write_text(json.dumps(to_config_json(config.model, positions=64, dtype="float32")))


def every_token(config, method):
    """log p of every token of the training data by the first weights, from rows packed by `method`."""
    data = DataConfig(**config.data.model_dump() | {"packing": {"method": method}})
    built = assemble.build_data(data, seed=0)
    annotate = initial_annotator(build(config, make_mesh(config.mesh)))
    notes = {"reference_logprobs": np.zeros(built.tokens, np.float32)}
    rows = range(built.train.rows_per_epoch())
    for some in unannotated_batches(
        built.train, rows, is_annotated=np.zeros(built.tokens, bool), size=config.data.global_batch
    ):
        store_annotations(notes, some, annotate(some))
    return built, notes["reference_logprobs"]


PACKED = {"llama": {"mesh": {"platform": "cpu"}}, "windows, sharded": {"model": {"windows": [3, None]}, "mesh": SEQ}}


@pytest.mark.parametrize("settings", PACKED.values(), ids=PACKED)
def test_packing_does_not_change_the_loss_of_an_example(settings, tmp_path):
    """Answers that share a row are as likely, token by token, as those that have one each."""
    config = run_of(tmp_path, "sft", **settings)
    packed, one = every_token(config, "best-fit")
    single, other = every_token(config, "single")
    assert packed.train.rows_per_epoch() * 2 < single.train.rows_per_epoch(), "nothing was packed"
    assert (one != 0).sum() > 200
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


ADAPTER = {"adapter": {"method": "lora", "rank": 2, "start": "pissa"}}
UNMOVED = {
    "dpo, full": ("dpo", {}, np.log(2)),
    "dpo, adapter": ("dpo", ADAPTER, np.log(2)),
    "ipo, pipeline": ("ipo", {"mesh": {"pipe": 2}, "microbatches": 2}, 25.0),
    "kto, zigzag": ("kto", {"mesh": {"fsdp": 2, "seq": 2}}, 0.5),
}


SLOW = ("ipo, pipeline", "kto, zigzag")
STARTS = [pytest.param(*case, id=key, marks=[pytest.mark.slow] if key in SLOW else []) for key, case in UNMOVED.items()]


@pytest.mark.parametrize(("name", "changes", "first"), STARTS)
def test_a_run_starts_at_its_reference_and_moves_away(name, changes, first, tmp_path):
    train(run_of(tmp_path, name, **changes), process_info=ProcessInfo(), root=tmp_path)
    found, last = losses(tmp_path / "run"), metric_rows(tmp_path / "run")[-1]
    np.testing.assert_allclose(found[1], first, rtol=2e-5)
    assert abs(found[5] - first) > 1e-3 * first
    assert last["held_out_loss"] > 0 and "held_out_perplexity" not in last


def test_a_resumed_run_has_the_same_reference(tmp_path):
    """Stopped after step 3: the reference of a run that goes on is the model at step 0, not the one it goes on with."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(run_of(tmp_path, "dpo"), process_info=ProcessInfo(), root=whole)
    train_until_stopped(run_of(tmp_path, "dpo"), stopped, step=3)
    train(run_of(tmp_path, "dpo", data={"cache": str(tmp_path / "cache")}), process_info=ProcessInfo(), root=stopped)
    np.testing.assert_allclose(list(losses(stopped / "run").values()), list(losses(whole / "run").values()), rtol=1e-5)


def test_another_reference_is_refused(tmp_path):
    """All weights are in the checkpoint, and yet the ones it began with are compared with again."""
    base = tmp_path / "base"
    settings = {"model": {"from": str(base)}, "data": {"tokenizer": {"bytes": True}}}
    written_base(base, scale=1.0)
    config = run_of(tmp_path, "dpo", steps=2, **settings)
    train(config, process_info=ProcessInfo(), root=tmp_path)
    written_base(base, scale=1.01)
    with pytest.raises(UserError, match="base holds other weights than this run was trained with"):
        train(run_of(tmp_path, "dpo", steps=3, **settings), process_info=ProcessInfo(), root=tmp_path)
    with pytest.raises(UserError, match="base holds other weights than this run was trained with"):
        inference_session.evaluate(tmp_path / "run", [])
    shutil.rmtree(base)
    inference_session.generate(tmp_path / "run", ["Yes"], tokens=1, temperature=0.0, top_k=None, top_p=None, seed=0)


def test_which_runs_read_their_initial_weights_again(tmp_path):
    """A recipe that compares with them, or is taught by them; one that only started from them does not."""
    written_base(tmp_path / "base", scale=1.0)
    origins = {}
    for name in ("dpo", "kto", "simpo", "distill"):
        data = {"data": {"format": "text"}} if name == "distill" else {}
        config = run_of(tmp_path, name, **merge_trees({"model": {"from": str(tmp_path / "base")}}, data))
        origins[name] = build(config, make_mesh(config.mesh)).origin
    assert origins["simpo"] is None
    assert origins["dpo"] is not None and origins["dpo"] == origins["kto"] == origins["distill"]


def test_annotations_are_the_models_logprobs_of_each_row(tmp_path):
    config = run_of(tmp_path, "dpo")
    program = build(config, make_mesh(config.mesh))
    data = with_reference_logprobs(program, assemble.build_data(config.data, seed=0), samples=range(20))
    assert isinstance(data.train, AnnotatedDataset)
    rows = [data.train.row(index) for index in range(4)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    forward = values_fn(
        target_logprobs(config.model, config.memory), program.graph, context=partial(make_context, config, program.mesh)
    )
    with jax.set_mesh(program.mesh):
        wanted = jax.jit(forward)(program.initial_weights(), {}, make_global_arrays(batch, config, program.mesh), None)
    np.testing.assert_allclose(batch["reference_logprobs"], np.where(batch["token_index"] >= 0, wanted, 0), rtol=1e-5)
