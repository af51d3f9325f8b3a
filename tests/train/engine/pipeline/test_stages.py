"""Training through a pipeline is training on one device; what cannot run in one is refused with what would work."""

import re

import numpy as np
import pytest
from support.equivalence import assert_same, tiny

from meshwright.configs.errors import UserError
from meshwright.configs.loader import merge_trees
from meshwright.parallel.hlo.text import parse_module
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.pipeline.tables.csv_io import write_csv
from meshwright.parallel.pipeline.tables.list_schedule import device_orders, tabulate
from meshwright.parallel.pipeline.tables.schedules.registry import make_table
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.engine.pipeline.pipeline_plan import make_pipeline_plan
from meshwright.train.engine.program import build
from meshwright.train.plan.compile_plan import step_flops
from meshwright.train.run import train

BASE = {"model": {"layers": 4}, "data": {"global_batch": 16}}
STAGED = {"mesh": {"pipe": 2}, "microbatches": 4}

# Name -> (the model on one device, what the pipeline adds). 1f1b and v-half with a shared vocabulary are below.
CASES = {
    "1f1b over data and tensor": ({}, {"mesh": {"pipe": 2, "data": 2, "tensor": 2}}),
    "zb-v over fsdp": (
        {"optimizer": {"name": "muon"}}, {"mesh": {"pipe": 2, "fsdp": 2}, "pipeline": {"schedule": "zb-v"}}
    ),
    "uneven stages, layers run again": (
        {"model": {"layers": 5, "qk_norm": True}, "optimizer": {"name": "sgd"}},
        {"mesh": {"pipe": 4, "tensor": 2}, "pipeline": {"schedule": "zb-h1"}, "memory": {"policy": "full"}},
    ),
    "a pattern of windows, heads exchanged": (
        {"model": {"windows": [4, None]}},
        {"mesh": {"pipe": 2, "seq": 2, "fsdp": 2, "zero": 1}, "sequence": {"parallel": "ulysses"}},
    ),
    "an adapter, a shared vocabulary": (
        {"adapter": {"method": "lora", "rank": 2, "targets": ["q", "v"]}, "optimizer": {"name": "sgd"}},
        {"mesh": {"pipe": 2, "tensor": 2}, "pipeline": {"schedule": "v-half", "vocab_parallel": 2}},
    ),
    "a fused backward, gathered keys": (
        {"model": {"family": "gpt2", "max_positions": 16, "dropout": 0.1, "qkv_bias": False},
         "optimizer": {"name": "sgd"}},
        {"mesh": {"pipe": 2, "seq": 2}, "pipeline": {"backward": "fused"}, "memory": {"policy": "minimal"}},
    ),
    "inputs of blocks on the host, over fsdp": (
        {"optimizer": {"name": "sgd"}},
        {"mesh": {"pipe": 2, "fsdp": 2}, "memory": {"policy": "offload-block-in"}},
    ),
    "some tensors on the host, W far from I": (
        {"optimizer": {"name": "sgd"}},
        {"mesh": {"pipe": 2, "fsdp": 2}, "pipeline": {"schedule": "zb-h1"}, "memory": {"policy": "minimal", "names": {
            "attn_norm": "offload", "q": "offload", "mlp_up": "offload"}}},
    ),
    "some tensors on the host, a fused backward": (
        {"optimizer": {"name": "sgd"}},
        {"mesh": {"pipe": 2, "fsdp": 2}, "pipeline": {"backward": "fused"}, "memory": {"policy": "full", "names": {
            "block_in": "offload", "mlp_norm": "offload"}}},
    ),
}  # fmt: skip


def pair(model, pipeline):
    """Both add up the same microbatches: Adam makes much of rounding in gradients that are almost zero."""
    plain = merge_trees(merge_trees(BASE, {"microbatches": 4}), model)
    return tiny(**plain), tiny(**merge_trees(plain, merge_trees(STAGED, pipeline)))


SLOW = {"some tensors on the host, a fused backward"}  # `test_engine.py` has it in small


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()]
)
def test_a_pipeline_trains_like_one_device(case):
    assert_same(*pair(*case), tolerance=4e-5)


MESHES = {"pipe 4 x tensor 2": {"pipe": 4, "tensor": 2}, "all": {"pipe": 2, "data": 2, "tensor": 2},
          "pipe 4 x fsdp 2": {"pipe": 4, "fsdp": 2}}  # fmt: skip
FAST = {("1f1b", 2, "pipe 4 x tensor 2"), ("v-half", 1, "all")}
SHARED = [
    pytest.param(schedule, algorithm, mesh, marks=[] if (schedule, algorithm, mesh) in FAST else [pytest.mark.slow])
    for schedule in ("1f1b", "v-half")
    for algorithm in (1, 2)
    for mesh in MESHES
]


@pytest.mark.parametrize(("schedule", "algorithm", "mesh"), SHARED)
def test_a_shared_vocabulary_trains_like_one_device(schedule, algorithm, mesh):
    model = {"model": {"layers": 8, "logit_softcap": 5.0, "tied_embeddings": algorithm == 1}}
    assert_same(*pair(model, {"mesh": MESHES[mesh], "pipeline": {"schedule": schedule, "vocab_parallel": algorithm}}))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb-v", "v-half"])
def test_twenty_steps_have_the_same_losses(schedule):
    vocabulary = 2 if schedule == "v-half" else 0
    # SGD: Adam makes steps of a learning rate's size out of rounding, and twenty of them are another curve.
    model = {"model": {"layers": 8}, "steps": 20, "optimizer": {"name": "sgd"}}
    plain, staged = pair(model, {"mesh": {"pipe": 4, "tensor": 2}, "pipeline": {
        "schedule": schedule, "vocab_parallel": vocabulary}})  # fmt: skip
    assert_same(plain, staged, steps=20, tolerance=2e-4)


REFUSED = {
    "too few layers": ({"mesh": {"pipe": 8}}, r"model.layers: 4 layers .* cannot fill the 8 stages"),
    "layers that do not add up": ({"pipeline": {"layers": [1, 2]}}, r"pipeline.layers: \[1, 2\] adds up to 3"),
    "too few stages listed": ({"pipeline": {"layers": [4]}}, r"pipeline.layers: \[4\] has 1 entries .* 2 stages"),
    "an unknown schedule": ({"pipeline": {"schedule": "1f1c"}}, r"pipeline.schedule: .*1f1c.* Did you mean 1f1b"),
    "a schedule without vocabulary passes": (
        {"pipeline": {"schedule": "zb-h1", "vocab_parallel": 2}},
        r"pipeline.vocab_parallel: 2, .*zb-h1",
    ),
    "a schedule that only evaluates": (
        {"pipeline": {"schedule": "forward-only"}},
        r"pipeline.schedule: forward-only matches nothing",
    ),
    "too few microbatches": (
        {"mesh": {"pipe": 4}, "microbatches": 2},
        r"microbatches: 2 leave most of 4 .* use at least 4",
    ),
    "a missing file": ({"pipeline": {"schedule": "none/there.csv"}}, r"there.csv"),
}


@pytest.mark.parametrize(("changes", "error"), REFUSED.values(), ids=REFUSED)
def test_a_schedule_without_a_table_is_refused_without_jax(changes, error):
    config = tiny(**merge_trees(merge_trees(BASE, STAGED), changes))
    with pytest.raises(UserError, match=error):
        make_pipeline_plan(config, pipe=config.mesh.pipe)


def test_a_file_whose_stages_are_not_neighbours_is_refused_without_jax(tmp_path):
    """GPipe's orders, the two middle stages on each other's devices: a schedule, but nobody sends that far."""
    table = make_table("gpipe", devices=4, microbatches=4)
    apart = tmp_path / "apart.csv"
    write_csv(tabulate(device_orders(table), np.array([[0], [2], [1], [3]]), algorithm=0, name="apart"), apart)
    config = tiny(**merge_trees(merge_trees(BASE, STAGED), {"mesh": {"pipe": 4}, "pipeline": {"schedule": str(apart)}}))
    with pytest.raises(UserError, match=r"pipeline.schedule: .* devices 0 and 2 of 4"):
        make_pipeline_plan(config, pipe=4)


UNFIT = {
    "ring attention": ({"mesh": {"seq": 2}, "sequence": {"parallel": "ring"}}, "sequence.parallel: ring"),
    "half a pattern": ({"model": {"layers": 5, "windows": [4, None]}}, "model.layers: 5 is not a multiple"),
    "chunks of a loss that is shared": (
        {"pipeline": {"vocab_parallel": 1}, "memory": {"loss_chunks": 2}}, "memory.loss_chunks: 2 has no effect"
    ),
    "replicas that would wait for each other": (
        {"mesh": {"replica": 2}, "outer": {"name": "diloco", "every": 2}, "pipeline": {"post_validation": True}},
        "pipeline.post_validation: true .* 2 replicas",
    ),
    "offload in replicas": (
        {"mesh": {"replica": 2}, "outer": {"name": "diloco", "every": 2}, "memory": {"policy": "offload-block-in"}},
        "memory.names: offload .* 2 replicas",
    ),
    "rows that cannot be dealt out": (
        {"mesh": {"pipe": 3}, "microbatches": 4}, "model.vocab_multiple: 64"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "error"), UNFIT.values(), ids=UNFIT)
def test_a_pipeline_that_does_not_fit_is_refused_by_the_configuration(changes, error):
    with pytest.raises(UserError, match=error):
        tiny(**merge_trees(merge_trees(BASE, STAGED), changes))


def test_balanced_layers_give_the_stage_with_the_head_fewer_layers():
    config = tiny(
        **merge_trees(
            merge_trees(BASE, STAGED), {"model": {"layers": 8, "vocab": 512}, "pipeline": {"layers": "balanced"}}
        )
    )
    found = make_pipeline_plan(config, pipe=2)
    assert sum(found.repeats) == 8 and found.repeats[0] > found.repeats[1]
    assert sorted(repeat for repeat in found.order if repeat >= 0) == list(range(8))


def test_the_plan_counts_the_flops_of_all_devices():
    plain, staged = (build(config, make_mesh(config.mesh)) for config in pair({}, {}))
    assert step_flops(staged) == step_flops(plain) > 0


@pytest.fixture(scope="module")
def compiled():
    """Computation -> instructions, of a step in which a device has one repeat a stage."""
    _, config = pair({}, {"pipeline": {"schedule": "zb-v"}})
    program = build(config, make_mesh(config.mesh))
    assert program.pipeline_plan.max_repeats == 1
    module = parse_module(program.compiled_step().as_text())
    return {name: computation.instructions for name, computation in module.computations.items()}


@pytest.fixture(scope="module")
def tick(compiled):
    """The instructions of a tick."""
    (found,) = [body for body in compiled.values() if any(one.opcode == "collective-permute" for one in body)]
    return found


def test_an_idle_tick_has_no_matrix_product(compiled, tick):
    """With one repeat a stage nothing in W depends on the round of its loop: the compiler would do it in every tick."""
    kinds = [{one.opcode for one in body} for body in compiled.values()]
    assert not {one.opcode for one in tick} & {"dot", "custom-call"} and any("dot" in found for found in kinds)


def test_no_message_is_sent_before_the_op_is_done(tick):
    """W changes nothing that is passed on: untied, a device would wait for its neighbours with W still to do."""
    reads = {one.name: set(re.findall(r"%([\w.\-]+)", one.text)) - {one.name} for one in tick}
    ops = {one.name for one in tick if one.opcode == "while"}
    assert len(ops) == 3  # F, I and W
    for passed in (one.name for one in tick if one.opcode == "collective-permute"):
        before, found = {passed}, set()
        while before:
            found |= before
            before = set().union(*(reads.get(name, set()) for name in before)) - found
        assert ops <= found


def test_a_run_resumes_with_another_schedule_and_without_a_pipeline(tmp_path, monkeypatch):
    """Begun as v-half, gone on as 1f1b over twice the devices, ended on one device: the curve of the one device."""
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path / "cache"))
    small = {
        "model": {"vocab": 384, "layers": 5},
        "logging": {"every": 1, "tensorboard": False},
        "optimizer": {"ema": 0.9, "schedule": "constant", "warmup_steps": 0},
        "evaluation": {"prompts": ["ab"], "sample_tokens": 2},
    }
    base = merge_trees(BASE, small)
    v = {"mesh": {"pipe": 2}, "microbatches": 4, "pipeline": {"schedule": "v-half", "vocab_parallel": 2}}
    more = {"mesh": {"pipe": 4}, "microbatches": 4, "pipeline": {"measure": False}}
    expected = train(
        tiny(**merge_trees(base, {"name": "whole", "steps": 6})), process_info=ProcessInfo(), root=tmp_path
    ).metrics
    for steps, layout in ((2, v), (4, more), (6, {})):
        found = train(
            tiny(**merge_trees(base, layout | {"steps": steps})), process_info=ProcessInfo(), root=tmp_path
        ).metrics
    for key in ("loss", "grad_norm", "held_out_loss"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4)
