"""The plan: exact bytes, the collectives a mesh must cause, and the golden plans of the shipped recipes.

A golden plan holds what no version of the compiler changes: what every array weighs and how it is sharded. To accept
a change: `PYTHONPATH=tests python tests/train/plan/test_compile_plan.py`.
"""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from support.equivalence import tiny

from meshwright.configs.loader import load_config, recipe_names
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.program import build
from meshwright.train.plan import compile_plan

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(recipe):
    """The golden plan of a shipped recipe, as text; its devices need not exist."""
    config = load_config(recipe)
    sizes = config.mesh.resolve_sizes(config.mesh.device_count or 1)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    planned = compile_plan.storage_plan(build(config, mesh))
    arrays = [json.dumps(array) for array in planned.pop("arrays")]
    head = json.dumps(planned, indent=1).removesuffix("\n}")
    return head + ',\n "arrays": [\n  ' + ",\n  ".join(arrays) + "\n ]\n}\n"


def golden_path(recipe):
    return GOLDEN / f"plan-{recipe.replace('/', '-')}.json"


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_shipped_recipe_has_its_golden_plan(recipe):
    assert golden(recipe) == golden_path(recipe).read_text(), (
        "changed; to accept it: PYTHONPATH=tests python tests/train/plan/test_compile_plan.py"
    )


def test_every_golden_plan_has_its_recipe():
    assert {file.name for file in GOLDEN.glob("plan-*.json")} == {golden_path(recipe).name for recipe in recipe_names()}


@pytest.fixture(scope="module")
def planned():
    """(program, plan) of a mesh with every axis of a dense model."""
    config = tiny(mesh={"data": 2, "fsdp": 2, "tensor": 2}, optimizer={"ema": 0.9}, model={"vocab": 64})
    program = build(config, make_mesh(config.mesh))
    return program, compile_plan.make_plan(program, program.compiled_step())


def test_bytes_are_those_of_the_arrays(planned):
    program, plan = planned
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.shapes)
    state = jax.device_put(zeros, program.shardings)
    trees = {"parameters": state.params, "optimizer": state.opt_state}
    for key, tree in trees.items():
        leaves = jax.tree.leaves(tree)
        assert plan[key]["bytes"] == sum(leaf.nbytes for leaf in leaves)
        assert plan[key]["bytes_per_device"] == sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert plan["parameters"]["count"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_arrays_have_the_names_and_shardings_of_the_state(planned):
    arrays = {array["name"]: array for array in planned[1]["arrays"]}
    assert arrays["params/embed/embedding"] == {
        "name": "params/embed/embedding", "shape": [64, 16], "dtype": "float32",
        "spec": ["tensor", "fsdp"], "bytes_per_device": 64 * 16,
    }  # fmt: skip
    assert arrays["opt_state/adamw/mu/segments/0/0/block/attn/q/kernel"]["spec"] == [None, "fsdp", "tensor", None]
    assert arrays["opt_state/adamw/count"]["spec"] == []


def test_the_compiled_step_updates_its_arguments_in_place(planned):
    compiled = planned[1]["compiled"]
    weights = sum(planned[1][key]["bytes_per_device"] for key in ("parameters", "optimizer"))
    assert compiled["alias_bytes"] >= weights and compiled["temporary_bytes"] > 0
    assert (
        compiled["peak_bytes"]
        == sum(compiled[f"{key}_bytes"] for key in ("argument", "output", "temporary")) - (compiled["alias_bytes"])
    )


def test_each_axis_causes_its_collectives(planned):
    """Weights are gathered over fsdp; activations are summed over tensor, and gradients over data.

    Between blocks the tokens of a row are sharded over tensor (sequence parallelism), so the next block's input is
    gathered.
    """
    collectives = planned[1]["collectives"]
    crossed = {axis for by_axes in collectives.values() for axes in by_axes for axis in axes.split("+")}
    assert crossed == {"data", "fsdp", "tensor"}
    assert {"fsdp", "tensor"} <= collectives["all-gather"].keys() and not any(
        "data" in axes for axes in collectives["all-gather"]
    )
    assert "tensor" in collectives["all-reduce"] and any("data" in axes for axes in collectives["all-reduce"])


@pytest.mark.parametrize(
    ("layout", "inputs"),
    [({}, 4), ({"data": 2}, 4), ({"pipe": 2}, 2 * 2 * 2), ({"pipe": 2, "fsdp": 2}, 2 * 2 * 2)],
    ids=["whole", "data", "pipeline", "pipeline and fsdp"],
)
def test_offloaded_bytes_count_every_layer_in_flight(layout, inputs):
    """`inputs` block inputs of a microbatch; a pipeline of two devices has two slots of two layers on each."""
    config = tiny(
        model={"layers": 4},
        mesh=layout,
        microbatches=4,
        data={"global_batch": 16},
        memory={"policy": "offload-block-in"},
    )
    value = 16 // 4 * config.data.sequence_length * config.model.embed * 4
    assert compile_plan.offload_plan(build(config, make_mesh(config.mesh))) == {"offloaded_bytes": inputs * value}


def test_flops_of_a_step_are_the_models_and_recomputation_costs_more(planned):
    """The reference attention does masked scores too: between one and two times the model's own count."""
    program, plan = planned
    config = program.config
    tokens = config.data.global_batch * config.data.sequence_length
    ratio = plan["compiled"]["flops_per_step"] / (plan["model_flops_per_token"] * tokens)
    assert 1.0 <= ratio < 1.3
    again = config.model_copy(update={"memory": config.memory.model_copy(update={"policy": "full"})})
    assert compile_plan.step_flops(build(again, program.mesh)) > 1.1 * plan["compiled"]["flops_per_step"]


def test_a_plan_is_json_and_the_same_every_time(planned):
    program, plan = planned
    assert json.loads(json.dumps(plan)) == plan
    assert compile_plan.storage_plan(program) == {key: plan[key] for key in compile_plan.storage_plan(program)}
    assert [device["id"] for device in plan["devices"]] == list(range(8))


def test_a_rendered_plan_is_short_and_shows_shardings(planned):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(compile_plan.render(planned[1]))
    text = console.export_text()
    assert "data 2 x fsdp 2 x tensor 2" in text and "all-gather" in text
    assert "params/embed/embedding" in text and "tensor, fsdp" in text
    assert len(text.splitlines()) < 40
    names = [line.split()[1] for line in text.partition("Largest")[2].splitlines()[4:-1]]
    assert names[0].startswith("params/") and len(set(names)) == len(names), "shortened names still differ"


def test_an_adapters_plan_shows_the_share_of_trained_weights(planned):
    assert compile_plan.trained_count(planned[1]) == planned[1]["parameters"]["count"]
    config = tiny(adapter={"method": "lora", "rank": 2, "targets": ["q"]}, mesh={})
    tuned = planned[1] | compile_plan.storage_plan(build(config, make_mesh(config.mesh)))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(compile_plan.render(tuned))
    inputs, outputs = config.model.embed, config.model.heads * config.model.head_width
    trained = config.model.layers * 2 * (inputs + outputs)
    assert f"trained {trained:,} " in " ".join(console.export_text().replace("│", " ").split())


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB"), (2**50, "1024 TiB")])
def test_sizes_have_a_unit(count, text):
    assert compile_plan.size(count) == text


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("plan-*.json"):
        old.unlink()
    for name in recipe_names():
        golden_path(name).write_text(golden(name))
