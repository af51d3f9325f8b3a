"""The executor: every schedule computes the same as all layers one after another, in float64."""

import re

import jax
import numpy as np
import pytest
from support.toy_stages import EMBED, FUNCTIONS, LENGTH, OFFLOADED, ROWS, make_engine, problem, reference, run

from meshwright.memory.jaxpr_stats import host_bytes
from meshwright.parallel.pipeline.tables.fused_backward import fuse_backward
from meshwright.parallel.pipeline.tables.lowering import lower_table
from meshwright.parallel.pipeline.tables.schedules.registry import SCHEDULES, make_table
from meshwright.parallel.pipeline.tables.simulator import pool_bytes

PIPE = 4
TRAINED = [name for name, family in SCHEDULES.items() if family.trains and "path" not in family.options]


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def table_of(name, **options):
    return make_table(name, devices=PIPE, microbatches=8, **options)


def compare(table, *, repeats=None, tied=False, mesh=None, functions=FUNCTIONS):
    """Loss, weight and every gradient of the engine equal the reference's to 1e-10."""
    repeats = repeats or (1,) * table.stages
    inputs = problem(layers=sum(repeats), tied=tied)
    results = run(table, repeats, *inputs, mesh=mesh or {"pipe": PIPE}, functions=functions)
    expected = jax.tree_util.tree_leaves_with_path(reference(*inputs)[: len(results)])
    for (path, exact), result in zip(expected, jax.tree.leaves(results), strict=True):
        np.testing.assert_allclose(result, exact, rtol=1e-10, atol=1e-10, err_msg=str(path))


@pytest.mark.parametrize("name", TRAINED)
def test_every_schedule_gives_the_same_loss_and_gradients(name):
    """Also with stages of one and of two layers."""
    table = table_of(name, vocabulary=SCHEDULES[name].vocabulary[0])
    compare(table, repeats=tuple(1 + stage % 2 for stage in range(table.stages)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("algorithm", [1, 2])
@pytest.mark.parametrize("name", [name for name in TRAINED if 2 in SCHEDULES[name].vocabulary])
def test_a_sharded_vocabulary_gives_the_same_loss_and_gradients(name, algorithm, tied):
    compare(table_of(name, vocabulary=algorithm), tied=tied)


@pytest.mark.parametrize("name", ["1f1b", "gpipe", "interleaved"])
def test_a_fused_backward_gives_the_same_loss_and_gradients(name):
    chunks = 2 if name == "interleaved" else None
    compare(fuse_backward(table_of(name, chunks=chunks)))


@pytest.mark.parametrize("vocabulary", [0, 1, 2])
def test_evaluation_gives_the_same_loss_without_a_backward_pass(vocabulary):
    trained = table_of("v-half", vocabulary=vocabulary)
    compare(table_of("forward-only", placement=trained.placement, vocabulary=vocabulary))


@pytest.mark.parametrize("vocabulary", [0, 2])
def test_rows_may_be_sharded_over_data_and_fsdp_too(vocabulary):
    table = make_table("1f1b", devices=2, microbatches=4, vocabulary=vocabulary)
    compare(table, tied=True, mesh={"pipe": 2, "data": 2, "fsdp": 2})


OFFLOADING = {
    "split backward": make_table("1f1b", devices=2, microbatches=4),
    "split backward, W late": make_table("zb-h1", devices=2, microbatches=4),
    "fused backward": fuse_backward(make_table("1f1b", devices=2, microbatches=4)),
    "two chunks, a sharded vocabulary": make_table("v-half", devices=2, microbatches=4, vocabulary=2),
}


@pytest.mark.parametrize("table", OFFLOADING.values(), ids=OFFLOADING)
def test_offloaded_values_give_the_same_loss_and_gradients(table):
    compare(table, repeats=(2, 1) * (table.stages // 2), mesh={"pipe": 2, "fsdp": 2}, functions=OFFLOADED)


@pytest.mark.parametrize("table", OFFLOADING.values(), ids=OFFLOADING)
def test_pools_of_offloaded_values_are_in_host_memory(table):
    """Two values of each layer and microbatch in flight, and nothing else; the program for a GPU says the same."""
    repeats = (2, 1) * (table.stages // 2)
    engine, arguments, mesh = make_engine(
        table, repeats, *problem(layers=sum(repeats), tied=False), mesh={"pipe": 2, "fsdp": 2}, functions=OFFLOADED
    )
    with jax.set_mesh(mesh):
        traced = engine.trace(*arguments)
    value = ROWS // 4 // 2 * LENGTH * EMBED * 8
    held = pool_bytes(table, input=0, weight=2 * 2 * value, stash=0)
    assert host_bytes(traced.jaxpr) == held * mesh.size
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    slots = lower_table(table, repeats=repeats).slots["weight"]
    pool = f"tensor<{slots}x2x{ROWS // 8}x{LENGTH}x{EMBED}xf64>"
    placed = re.findall(r"annotate_device_placement.*pinned_host.* -> (\S+)", text)
    assert placed.count(pool) == 2


@pytest.mark.parametrize("name", ["1f1b", "v-half"])
def test_pools_do_not_grow_with_the_number_of_microbatches(name):
    few, many = (
        lower_table(make_table(name, devices=PIPE, microbatches=count, vocabulary=1), repeats=(1,) * 8).slots
        for count in (16, 64)
    )
    assert few == many
