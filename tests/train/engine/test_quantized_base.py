"""A quantized base in a whole step and a whole run: the adapter learns as on the weights it stands for, on any mesh."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.equivalence import assert_close, assert_same, batches, tiny

from meshwright.configs.errors import UserError
from meshwright.configs.loader import validate_tree
from meshwright.models.adapters.merge import merge_adapters
from meshwright.models.context import Context
from meshwright.models.decoder import decoder_graphdef
from meshwright.models.quantized_model import dequantize_tree
from meshwright.parallel.hlo.collectives import collectives
from meshwright.parallel.layout import to_canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.program import build
from meshwright.train.infer.inference_session import inference_config, load_program
from meshwright.train.objectives.distillation import init_weights
from meshwright.train.plan.compile_plan import storage_plan
from meshwright.train.run import train

MODEL = {"mlp": 32, "layers": 2}
NF4 = {"format": "nf4", "group": 8, "double": True}
QLORA = {"model": MODEL, "quantization": NF4, "adapter": {"rank": 4, "dropout": 0.1}}
MESH = {"fsdp": 2, "tensor": 2}
SAME = {
    "qlora": (QLORA, {"mesh": MESH}),
    "three bits, dora, recomputed": (
        {"model": MODEL, "quantization": {"format": "int3", "group": 8}, "adapter": {"method": "dora", "rank": 4}},
        {"mesh": MESH, "microbatches": 2, "memory": {"policy": "minimal"}},
    ),
}


@pytest.mark.parametrize("name", ["qlora", pytest.param("three bits, dora, recomputed", marks=pytest.mark.slow)])
def test_the_result_is_the_same_on_every_mesh(name):
    settings, changes = SAME[name]
    assert_same(tiny(**settings), tiny(**settings, **changes), steps=3)


@pytest.mark.slow
def test_the_result_is_the_same_in_a_pipeline():
    settings = QLORA | {"microbatches": 4}
    assert_same(tiny(**settings), tiny(**settings, mesh={"pipe": 2}, pipeline={"schedule": "zb-h1"}), steps=2)


def after(program, state, steps):
    """Losses, and the canonical trained parameters after `steps`."""
    step, losses = jax.jit(program.step), []
    with jax.set_mesh(program.mesh):
        for batch in batches(program.config, steps):
            state, metrics = step(state, make_global_arrays(batch, program.config, program.mesh))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(to_canonical(state.params, program.config.model))


@pytest.mark.parametrize("start", ["zero", pytest.param("loftq", marks=pytest.mark.slow)])
def test_an_adapter_trains_as_on_the_dequantized_base(start):
    """The same leaves beside kernels that hold in full what the codes stand for: the same steps."""
    settings = QLORA | {"adapter": {"rank": 4, "start": start}}
    config = tiny(**settings)
    program = build(config, make_mesh(config.mesh))
    state = program.initialize()
    full = tiny(**settings | {"quantization": None, "adapter": {"rank": 4}})
    plain = build(full, program.mesh)
    frozen = dequantize_tree(state.frozen, config.model, config.quantization, dtype=jnp.float32)
    assert jax.tree.structure(frozen) == jax.tree.structure(plain.shapes.frozen)
    losses, params = after(program, state, 4)
    wanted, others = after(plain, dataclasses.replace(state, frozen=frozen), 4)
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)
    assert_close(params, others, tolerance=1e-6)
    assert abs(losses[0] - after(plain, plain.initialize(), 1)[0][0]) > 1e-5  # the weights did change


@pytest.mark.slow
def test_loftq_starts_nearer_to_the_full_weights():
    """|W - Q - A B| is smaller than |W - Q|, for every kernel."""
    full = tiny(model=MODEL)
    weights = jax.jit(lambda: build(full, make_mesh(full.mesh)).initial().params)()

    def error(start):
        config = tiny(model=MODEL, quantization={"format": "int2", "group": 8}, adapter={"rank": 4, "start": start})
        program = build(config, make_mesh(config.mesh))
        tree = merge_adapters(program.dequantized_weights(program.initialize()), config.model, config.adapter)
        apart = jax.tree.map(lambda one, other: jnp.linalg.norm(one - other), tree, weights)["segments"]
        return np.array(jax.tree.leaves(apart))

    lost, less = error("zero"), error("loftq")
    assert (less[lost > 0] < 0.75 * lost[lost > 0]).all()


def step_of(layers, **changes):
    model = {"embed": 64, "mlp": 256, "layers": layers, "heads": 4}
    settings = {"model": model, "data": {"sequence_length": 8}, "adapter": {"rank": 1, "targets": ["q"]}}
    config = tiny(**settings, **changes)
    mesh = make_mesh(config.mesh)
    return build(config, mesh).compiled_step(), mesh


def test_the_step_never_holds_the_dequantized_model():
    """A further layer costs no more temporary memory than one whose kernels need not be made."""

    def growth(quantization):
        few, many = (step_of(layers, quantization=quantization)[0].memory_analysis() for layers in (2, 6))
        return (many.temp_size_in_bytes - few.temp_size_in_bytes) / 4

    assert growth({"group": 16}) < growth(None) + 0.1 * 3 * 64 * 256 * 4  # of the kernels of an MLP


def test_collectives_send_codes_and_not_weights():
    """Over fsdp the largest thing gathered is the codes of a kernel."""
    compiled, mesh = step_of(2, quantization={"group": 16}, mesh=MESH)
    found = [one for one in collectives(compiled.as_text(), mesh) if one.kind == "all-gather" and "fsdp" in one.axes]
    assert found and max(one.bytes for one in found) < 64 * 256


def test_the_plan_counts_the_codes():
    found = storage_plan(build(tiny(**QLORA), make_mesh(tiny().mesh)))
    arrays = {array["name"]: array for array in found["arrays"]}
    up = "frozen/segments/0/0/block/mlp/up/kernel"
    assert arrays[f"{up}/codes"]["shape"] == [2, 8, 32] and arrays[f"{up}/codes"]["dtype"] == "uint8"
    assert arrays[f"{up}/scale"]["shape"] == [2, 2, 32] and up not in arrays
    plain = storage_plan(build(tiny(**QLORA | {"quantization": None}), make_mesh(tiny().mesh)))
    assert found["parameters"]["count"] == plain["parameters"]["count"]


REPAIR = QLORA | {"recipe": {"name": "lrec"}, "quantization": {"format": "int2", "group": 8}}


def test_lrec_brings_the_quantized_model_back_to_the_full_one():
    """The loss is KL(whole || quantized) by the dense formula, and falls."""
    optimizer = {"learning_rate": 0.02, "weight_decay": 0.0, "schedule": "constant"}
    settings = REPAIR | {"adapter": {"rank": 8}, "optimizer": optimizer, "memory": {"loss_chunks": 4}}
    config = tiny(**settings)
    program = build(config, make_mesh(config.mesh))
    state = program.initialize()
    losses, _ = after(program, state, 40)
    assert losses[-1] < 0.6 * losses[0]
    batch = batches(config, 1)[0]
    quantized, whole = (
        dense_logprobs(config.model, tree, batch) for tree in (program.dequantized_weights(state), None)
    )
    apart = (np.exp(whole) * (whole - quantized)).sum(-1)
    wanted = (batch["loss_weights"] * apart).sum() / batch["loss_weights"].sum()
    assert losses[0] == pytest.approx(wanted, rel=1e-3)


def dense_logprobs(model, tree, batch):
    """log p of the whole vocabulary, of the plain model of `tree` (None: fresh weights)."""
    plain = tiny(model=MODEL)
    weights = (
        jax.jit(lambda: init_weights(plain))() if tree is None else merge_adapters(tree, model, tiny(**QLORA).adapter)
    )
    ctx = Context(positions=jnp.asarray(batch["positions"]), segment_ids=jnp.asarray(batch["segment_ids"]))
    decoder = nnx.merge(decoder_graphdef(model), weights)
    hidden, _ = jax.jit(lambda: decoder.hidden(jnp.asarray(batch["tokens"]), ctx))()
    scores = (hidden @ decoder.head_kernel(jnp.float32))[..., : model.vocab]
    return np.asarray(jax.nn.log_softmax(scores))


@pytest.mark.slow
def test_lrec_gives_the_same_result_on_every_mesh():
    assert_same(tiny(**REPAIR), tiny(**REPAIR, mesh=MESH, memory={"loss_chunks": 2}), steps=3)


@pytest.mark.slow
def test_lrec_gives_the_same_result_in_a_pipeline():
    """The model as it was passes through a pipeline of its own."""
    plain = REPAIR | {"model": MODEL | {"layers": 4}, "microbatches": 4}
    staged = {"mesh": {"pipe": 2, "tensor": 2}, "pipeline": {"schedule": "zb-v"}}
    assert_same(tiny(**plain), tiny(**plain, **staged), steps=3)


MISTAKES = {
    "nothing to repair": ({"recipe": {"name": "lrec"}}, "recipe.name: lrec .*quantization"),
    "no adapter": ({"quantization": NF4}, "quantization.format: nf4 .*add an adapter"),
    "straddles": (QLORA | {"mesh": {"tensor": 2}, "model": {"mlp": 40}}, r"model.mlp \(40\) over mesh.ten"),
    "width": (QLORA | {"quantization": {"group": 64}}, r"group: 64 does not divide model.embed \(16\)"),
    "double": ({"quantization": {"format": "int4", "double": True}}, "quantization.double: true .*int4"),
    "loftq": ({"adapter": {"start": "loftq"}}, "adapter.start: loftq .*quantization"),
}


@pytest.mark.parametrize(("settings", "error"), MISTAKES.values(), ids=MISTAKES)
def test_a_quantization_that_cannot_work_is_refused(settings, error):
    with pytest.raises(UserError, match=error):
        tiny(**settings)


def run_config(**changes):
    tree = {"name": "run", "steps": 4, "optimizer": {"schedule": "constant"}, "checkpoint": {"every": 2}}
    model = MODEL | {"vocab": 258}
    return validate_tree(
        {**tiny(**QLORA | {"model": model}).model_dump(mode="json"), **tree, "logging": {"tensorboard": False}}
        | changes
    )


def test_a_run_resumes_from_its_own_base(tmp_path):
    """On another mesh too; without the base it is refused."""
    whole = train(run_config(), process_info=ProcessInfo(), root=tmp_path)
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    rest = train(run_config(mesh={"platform": "cpu", **MESH}), process_info=ProcessInfo(), root=tmp_path)
    assert rest.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-5)
    program, state = load_program(inference_config(tmp_path / "run", []), tmp_path / "run")
    assert program.dequantized_weights(state)["segments"]["0"]["0"]["block"]["mlp"]["up"]["kernel"].shape == (2, 16, 32)
    shutil.rmtree(tmp_path / "run/base")
    with pytest.raises(UserError, match="the quantized base is missing"):
        load_program(inference_config(tmp_path / "run", []), tmp_path / "run")
