"""Adapters in a whole step and a whole run: on every axis the same, and going on after a stop is the same run."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.equivalence import assert_same, batches, tiny

from meshwright.checkpoint.interop import huggingface
from meshwright.configs.errors import UserError
from meshwright.configs.huggingface import to_config_json
from meshwright.configs.loader import validate_tree
from meshwright.configs.sections.adapter import METHOD_KEYS, SPARSE_METHODS
from meshwright.models.decoder import initial_params
from meshwright.parallel.hlo.collectives import collectives
from meshwright.parallel.layout import from_canonical, reorder_layers, to_canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.data.tokenizer import byte_tokenizer
from meshwright.train.engine.program import build
from meshwright.train.infer.import_export import export_adapter, export_run, import_directory
from meshwright.train.objectives.distillation import init_weights
from meshwright.train.run import train

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
LORA = {"method": "lora", "rank": 4, "ranks": {"layers/0/*": 2}, "ratio": 4.0, "dropout": 0.1}
SAME = {
    "lora, all of it": ({"adapter": LORA}, {"mesh": MESH, "microbatches": 2, "memory": {"policy": "minimal"}}),
    "dropout, tokens in a zigzag": ({"adapter": LORA}, {"mesh": {"seq": 2}}),
    "dora": ({"adapter": {"method": "dora", "rank": 4, "start": "pissa"}}, {"mesh": MESH}),
}


# Settings of a method where its defaults do not fit the tiny model.
SETTINGS = {
    "selective": {"layers": 1},
    **{method: {"scouting": 1, "density": 0.2} for method in SPARSE_METHODS},
    "oft": {"block": 4},
    "shira": {"rank": 2},
    "adalora": {"rank": 4, "budget": {"rank": 2}},
    "prefix": {"length": 4},
    "prompt": {"length": 4},
    "p-tuning": {"length": 4},
    "tokens": {"tokens": [1, 5, 9]},
    "serial": {"rank": 4},
    "parallel": {"rank": 4},
    "mam": {"rank": 4, "length": 4},
    "unipelt": {"rank": 4, "length": 4, "ranks": {"mlp": 6}},
}
PIPELINED = {"mesh": {"pipe": 2, "data": 2, "tensor": 2}, "microbatches": 2}
# Beside plain meshes of data, fsdp and tensor: where leaves lie elsewhere than beside linear maps.
SPLITS = {
    **dict.fromkeys(("prefix", "tokens", "serial", "parallel", "mam"), PIPELINED),
    "prompt": {"mesh": MESH, "microbatches": 2, "memory": {"policy": "minimal"}},
    "unipelt": {"mesh": {"pipe": 2, "fsdp": 2, "tensor": 2}, "microbatches": 2, "memory": {"policy": "minimal"}},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHOD_KEYS)
def test_every_method_gives_the_same_result_on_every_mesh(method):
    config = {"adapter": {"method": method, **SETTINGS.get(method, {})}, "model": {"qkv_bias": True}}
    if method == "unipelt":  # gates of what is zero at first have hardly a gradient, which Adam makes whole steps of
        config["optimizer"] = {"name": "sgd", "b1": 0.0, "learning_rate": 1.0}
    split = SPLITS.get(method, {"mesh": MESH})
    if "pipe" not in split["mesh"]:
        config["model"]["scan"] = False
    assert_same(tiny(**config), tiny(**config, **split), steps=3)


@pytest.mark.parametrize(("settings", "changes"), SAME.values(), ids=SAME)
def test_the_result_is_the_same_on_every_mesh(settings, changes):
    assert_same(tiny(**settings), tiny(**settings, **changes), steps=3)


@pytest.mark.parametrize(
    "adapter",
    [
        {"method": "dora", "rank": 4},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in ({"method": "vera"}, {"method": "oft", "block": 4}, {"method": "shira", "rank": 2})
        ),
    ],
    ids=lambda settings: settings["method"],
)
def test_an_adapter_needs_no_collective_permute(adapter):
    """Inside a pipeline's stage one would never return; the plain model has none on this mesh either."""
    config = tiny(mesh=MESH, adapter=adapter)
    mesh = make_mesh(config.mesh)
    found = collectives(build(config, mesh).compiled_step().as_text(), mesh)
    assert found and not [one for one in found if one.kind == "collective-permute"]


LAST = {"model": {"layers": 8}, "adapter": {"method": "selective", "layers": 2}}


def test_below_the_trained_layers_there_is_no_backward_pass():
    """Training the last two of eight blocks: the forward pass of all, and of the backward pass their part."""
    from meshwright.train.plan.compile_plan import step_flops

    def flops(**settings):
        config = tiny(**settings, data={"sequence_length": 8})
        return step_flops(build(config, make_mesh(config.mesh)))

    whole, sparse = (flops(**settings) for settings in ({"model": {"layers": 8}}, LAST))
    assert sparse < 0.55 * whole  # a third forward, a sixth backward, and the head
    assert flops(**LAST | {"adapter": {"rank": 1, "layers": 2}}) < 0.55 * whole
    assert flops(**LAST | {"adapter": {"rank": 1, "targets": ["layers/[67]/attn/q"]}}) < 0.55 * whole


def test_trained_layers_have_the_gradients_of_training_all_layers():
    """The gradients of the two blocks are those of training them all; others have neither gradient nor state."""
    whole, chosen = (tiny(**settings) for settings in ({"model": {"layers": 8}}, LAST))
    weights = to_canonical(jax.jit(lambda: init_weights(whole))(), whole.model)
    batch = batches(whole, 1)[0]

    def gradient(config):
        program = build(config, make_mesh(config.mesh))
        like = jax.eval_shape(lambda: init_weights(config))
        state = program.initial(from_canonical(weights, like, config.model))
        with jax.set_mesh(program.mesh):
            sums = jax.jit(lambda: program.gradient_engine(state.params, state.frozen, batch, None))()
        return float(sums.loss), to_canonical(sums.gradient, config.model)

    (loss, every), (same, own) = gradient(whole), gradient(chosen)
    assert same == pytest.approx(loss, rel=1e-6)
    assert {name.split("/")[1] for name in own} == {"6", "7"}
    for name, array in own.items():
        np.testing.assert_allclose(array, every[name], atol=1e-5 * np.abs(every[name]).max(), err_msg=name)


@pytest.mark.slow
def test_trained_segments_give_the_same_result_on_every_mesh():
    settings = LAST | {"model": {"layers": 5, "windows": [4, None]}, "adapter": {"rank": 4, "layers": 2}}
    assert_same(tiny(**settings), tiny(**settings, mesh=MESH), steps=3)


def updates_of(**settings):
    """What the optimizer makes of gradients of one at weights of one."""
    config = tiny(**settings)
    program = build(config, make_mesh(config.mesh))

    @jax.jit
    def update():
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), program.shapes.params)
        return program.optimizer.update(ones, program.optimizer.init(ones), ones)[0]

    return to_canonical(update(), config.model)


def test_only_trained_weights_change():
    """Two layers in one stack, of which one is chosen for its MLP: the other takes no step, nor does it decay."""
    targets = ["layers/1/mlp/*", "layers/0/attn/*", "final_norm/*"]
    found = updates_of(adapter={"method": "selective", "targets": targets})
    moved = {name for name, update in found.items() if np.any(update)}
    chosen = {name for name in found if name.startswith(("layers/1/mlp", "layers/0/attn/"))}
    assert moved == chosen | {"final_norm/scale"}
    assert any(name.startswith("layers/0/mlp") for name in found) and not any("embed/" in name for name in found)


def test_only_trained_weights_change_in_any_run_order_of_a_pipeline():
    """Layers stand as the stages of a V do, one chunk has an empty place, and the one that was chosen moves."""
    config = tiny(
        model={"layers": 5},
        mesh={"pipe": 2},
        microbatches=4,
        pipeline={"schedule": "v-half"},
        adapter={"method": "selective", "targets": ["layers/1/mlp/*"]},
    )
    program = build(config, make_mesh(config.mesh))
    assert list(program.order) != sorted(program.order) and -1 in program.order

    @jax.jit
    def update():
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), program.shapes.params)
        made = program.optimizer.update(ones, program.optimizer.init(ones), ones)[0]
        return reorder_layers({"params": made}, before=program.order, after=None)["params"]

    found = to_canonical(update(), config.model)
    assert {name for name, update in found.items() if np.any(update)} == {
        name for name in found if name.startswith("layers/1/mlp/")
    }


def test_lora_plus_scales_the_updates_of_the_second_factor():
    """LoRA+ with plain gradient descent: B moves `ratio` times as far as A for the same gradient."""
    found = updates_of(adapter={"rank": 4, "ratio": 16.0}, optimizer={"name": "sgd", "b1": 0.0, "clip": None})
    a, b = (found[f"layers/1/attn/v/adapter/{name}"].max() for name in "ab")
    assert a < 0
    np.testing.assert_allclose(b, 16 * a, rtol=1e-6)


def model_directory(path):
    """A random Qwen 3 with a byte tokenizer, as a Hugging Face directory."""
    config = tiny(model={"family": "qwen3", "vocab": 384})
    params = jax.jit(lambda: initial_params(config.model, jax.random.key(5)))()
    path.mkdir()
    tree = to_config_json(config.model, positions=64, dtype="float32")
    (path / "config.json").write_text(json.dumps(tree))
    huggingface.write(params, config.model, path, kind=tree["model_type"], limit=10**9)
    byte_tokenizer().save(path)
    return path


def tuned(directory, **changes):
    """A run of four steps that adapts the model in `directory`."""
    tree = {
        "name": "tuned",
        "steps": 4,
        "model": {"from": str(directory)},
        "adapter": {"rank": 4, "start": "pissa"},
        "data": {"source": "synthetic", "sequence_length": 16, "global_batch": 8, "held_out": 0.0},
        "logging": {"every": 1, "tensorboard": False},
        "optimizer": {"schedule": "constant"},
        "mesh": {"platform": "cpu"},
    }
    return validate_tree(tree | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(base directory, root, last loss of a run of 4 steps, and of its last 2 once more from its checkpoint)."""
    root = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MESHWRIGHT_CACHE", str(root / "cache"))
        base = model_directory(root / "base")
        whole = train(tuned(base, checkpoint={"every": 2}), process_info=ProcessInfo(), root=root)
        shutil.rmtree(root / "tuned/checkpoints/4")
        rest = train(tuned(base, mesh=MESH | {"platform": "cpu"}), process_info=ProcessInfo(), root=root)
    return base, root, whole.metrics["loss"], rest.metrics["loss"]


def test_a_stopped_run_resumes_from_its_directory(runs):
    """No checkpoint holds the base: it is read again, and PiSSA's start taken out of it again."""
    _, _, whole, rest = runs
    assert rest == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_gates_resume_from_their_checkpoint(runs):
    base, root, *_ = runs
    config = tuned(base, name="gated", adapter={"method": "unipelt", "rank": 4, "length": 3}, checkpoint={"every": 2})
    whole = train(config, process_info=ProcessInfo(), root=root)
    shutil.rmtree(root / "gated/checkpoints/4")
    assert train(config, process_info=ProcessInfo(), root=root).metrics["loss"] == pytest.approx(
        whole.metrics["loss"], rel=1e-6
    )
    with pytest.raises(UserError, match=r"adapter\.method: unipelt"):
        export_adapter(root / "gated", root / "adapter")


def test_an_exported_adapter_merges_into_the_same_model(runs, tmp_path):
    """Run -> PEFT's files -> a run again: both merge into the same model, which is not the base."""
    base, root, *_ = runs
    names = export_adapter(root / "tuned", tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(names)
    import_directory(base, tmp_path / "again", adapter=tmp_path / "adapter")
    merged = []
    for run in (root / "tuned", tmp_path / "again"):
        export_run(run, tmp_path / f"merged-{run.name}", limit=10**9)
        merged.append(load_file(tmp_path / f"merged-{run.name}/model.safetensors"))
    for name, array in merged[0].items():
        np.testing.assert_allclose(merged[1][name], array, atol=1e-5, err_msg=name)
    query = "model.layers.1.self_attn.q_proj.weight"
    assert np.abs(merged[0][query] - load_file(base / "model.safetensors")[query]).max() > 1e-4


def test_another_base_is_refused(runs, tmp_path):
    """The same names and shapes, other numbers: going on would train an adapter of neither."""
    base, root, *_ = runs
    shutil.copytree(base, tmp_path / "kept")
    other = tuned(base, steps=6)
    weights = build(other, make_mesh(other.mesh)).pretrained_weights()
    (base / "model.safetensors").unlink()
    changed = jax.tree.map(lambda leaf: 1.01 * leaf, weights)
    huggingface.write(changed, other.model, base, kind="qwen3", limit=10**9)
    with pytest.raises(UserError, match="holds other weights than this run was trained with"):
        train(other, process_info=ProcessInfo(), root=root)
    shutil.copyfile(tmp_path / "kept/model.safetensors", base / "model.safetensors")
