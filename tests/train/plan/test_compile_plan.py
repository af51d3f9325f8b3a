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
from meshwright.train.plan.compile_plan import compile_plan

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(recipe):
    """The golden plan of a shipped recipe, as text; its devices need not exist."""
    config = load_config(recipe)
    sizes = config.mesh.resolve_sizes(config.mesh.device_count or 1)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    made = compile_plan.storage_plan(build(config, mesh))
    arrays = [json.dumps(array) for array in made.pop("arrays")]
    head = json.dumps(made, indent=1).removesuffix("\n}")
    return head + ',\n "arrays": [\n  ' + ",\n  ".join(arrays) + "\n ]\n}\n"


def file_of(recipe):
    return GOLDEN / f"plan-{recipe.replace('/', '-')}.json"


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_shipped_recipe_has_its_golden_plan(recipe):
    assert golden(recipe) == file_of(recipe).read_text(), (
        "changed; to accept it: PYTHONPATH=tests python tests/train/plan/test_compile_plan.py"
    )


def test_every_golden_plan_has_its_recipe():
    assert {file.name for file in GOLDEN.glob("plan-*.json")} == {file_of(recipe).name for recipe in recipe_names()}


@pytest.fixture(scope="module")
def made():
    """(program, plan) of a mesh with every axis of a dense model."""
    config = tiny(mesh={"data": 2, "fsdp": 2, "tensor": 2}, optimizer={"ema": 0.9}, model={"vocab": 64})
    program = build(config, make_mesh(config.mesh))
    return program, compile_plan.make_plan(program, program.compiled_step())


def test_bytes_are_those_of_the_arrays(made):
    program, found = made
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), program.shapes)
    state = jax.device_put(zeros, program.shardings)
    trees = {"parameters": state.params, "optimizer": state.opt_state}
    for key, tree in trees.items():
        leaves = jax.tree.leaves(tree)
        assert found[key]["bytes"] == sum(leaf.nbytes for leaf in leaves)
        assert found[key]["bytes_per_device"] == sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    assert found["parameters"]["count"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))


def test_arrays_are_named_and_sharded_as_they_will_be(made):
    found = {array["name"]: array for array in made[1]["arrays"]}
    assert found["params/embed/embedding"] == {
        "name": "params/embed/embedding", "shape": [64, 16], "dtype": "float32",
        "spec": ["tensor", "fsdp"], "bytes_per_device": 64 * 16,
    }  # fmt: skip
    assert found["opt_state/adamw/mu/segments/0/0/block/attn/q/kernel"]["spec"] == [None, "fsdp", "tensor", None]
    assert found["opt_state/adamw/count"]["spec"] == []


def test_the_compiled_step_updates_its_arguments_in_place(made):
    compiled = made[1]["compiled"]
    weights = sum(made[1][key]["bytes_per_device"] for key in ("parameters", "optimizer"))
    assert compiled["alias_bytes"] >= weights and compiled["temporary_bytes"] > 0
    assert (
        compiled["peak_bytes"]
        == sum(compiled[f"{key}_bytes"] for key in ("argument", "output", "temporary")) - (compiled["alias_bytes"])
    )


def test_each_axis_causes_its_collectives(made):
    """Weights are gathered over fsdp, activations summed over tensor, gradients over data.

    Between blocks the tokens of a row are cut over tensor: what the next block reads is gathered, which would not be
    needed if every device kept the whole row.
    """
    found = made[1]["collectives"]
    crossed = {axis for by_axes in found.values() for axes in by_axes for axis in axes.split("+")}
    assert crossed == {"data", "fsdp", "tensor"}
    assert {"fsdp", "tensor"} <= found["all-gather"].keys() and not any("data" in axes for axes in found["all-gather"])
    assert "tensor" in found["all-reduce"] and any("data" in axes for axes in found["all-reduce"])


@pytest.mark.parametrize(
    ("layout", "held"),
    [({}, 4), ({"data": 2}, 4), ({"pipe": 2}, 2 * 2 * 2), ({"pipe": 2, "fsdp": 2}, 2 * 2 * 2)],
    ids=["whole", "data", "pipeline", "pipeline and fsdp"],
)
def test_offloaded_bytes_are_those_of_every_layer_in_flight(layout, held):
    """`held` layers' inputs of a microbatch: in a pipeline of two, two slots of two layers on each device."""
    config = tiny(
        model={"layers": 4},
        mesh=layout,
        microbatches=4,
        data={"global_batch": 16},
        memory={"policy": "offload-block-in"},
    )
    value = 16 // 4 * config.data.sequence_length * config.model.embed * 4
    assert compile_plan.offload_plan(build(config, make_mesh(config.mesh))) == {"offloaded_bytes": held * value}


def test_flops_of_a_step_are_the_models_and_recomputation_costs_more(made):
    """The reference attention does masked scores too: between one and two times the model's own count."""
    program, found = made
    config = program.config
    tokens = config.data.global_batch * config.data.sequence_length
    ratio = found["compiled"]["flops_per_step"] / (found["model_flops_per_token"] * tokens)
    assert 1.0 <= ratio < 1.3
    again = config.model_copy(update={"memory": config.memory.model_copy(update={"policy": "full"})})
    assert compile_plan.step_flops(build(again, program.mesh)) > 1.1 * found["compiled"]["flops_per_step"]


def test_a_plan_is_json_and_the_same_every_time(made):
    program, found = made
    assert json.loads(json.dumps(found)) == found
    assert compile_plan.storage_plan(program) == {key: found[key] for key in compile_plan.storage_plan(program)}
    assert [device["id"] for device in found["devices"]] == list(range(8))


def test_a_plan_is_shown_short_with_its_sharding(made):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(compile_plan.render(made[1]))
    text = console.export_text()
    assert "data 2 x fsdp 2 x tensor 2" in text and "all-gather" in text
    assert "params/embed/embedding" in text and "tensor, fsdp" in text
    assert len(text.splitlines()) < 40
    names = [line.split()[1] for line in text.partition("Largest")[2].splitlines()[4:-1]]
    assert names[0].startswith("params/") and len(set(names)) == len(names), "each is told from the others"


def test_an_adapters_plan_says_how_much_of_the_model_learns(made):
    assert compile_plan.trained(made[1]) == made[1]["parameters"]["count"]
    config = tiny(adapter={"method": "lora", "rank": 2, "targets": ["q"]}, mesh={})
    tuned = made[1] | compile_plan.storage_plan(build(config, make_mesh(config.mesh)))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(compile_plan.render(tuned))
    inputs, outputs = config.model.embed, config.model.heads * config.model.head_width
    learns = config.model.layers * 2 * (inputs + outputs)
    assert f"trained {learns:,} " in " ".join(console.export_text().replace("│", " ").split())


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB"), (2**50, "1024 TiB")])
def test_sizes_are_for_people(count, text):
    assert compile_plan.size(count) == text


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("plan-*.json"):
        old.unlink()
    for name in recipe_names():
        file_of(name).write_text(golden(name))
