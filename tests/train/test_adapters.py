"""Adapters in a whole step and a whole run: on every axis the same, and going on after a stop is the same run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from equivalence import assert_same, tiny, trajectory
from meshwright.checkpoint import huggingface
from meshwright.configs.errors import UserError
from meshwright.configs.huggingface import config_json
from meshwright.configs.load import validated
from meshwright.models.decoder import initial_params
from meshwright.parallel.hlo import collectives
from meshwright.parallel.layout import canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.state import combine
from meshwright.train.data.tokenizer import byte_tokenizer
from meshwright.train.launch.world import World
from meshwright.train.program import build
from meshwright.train.run import train

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
LORA = {"method": "lora", "rank": 4, "ranks": {"layers/0/*": 2}, "ratio": 4.0, "dropout": 0.1}
SAME = {
    "lora, all of it": ({"adapter": LORA}, {"mesh": MESH, "microbatches": 2, "memory": {"policy": "minimal"}}),
    "dora": ({"adapter": {"method": "dora", "rank": 4, "start": "pissa"}}, {"mesh": MESH}),
    "vera": ({"adapter": {"method": "vera", "rank": 8}}, {"mesh": MESH}),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.parametrize(("settings", "changes"), SAME.values(), ids=SAME)
def test_a_mesh_changes_nothing(settings, changes):
    assert_same(tiny(**settings), tiny(**settings, **changes), steps=3)


@pytest.mark.parametrize("method", ["dora", "vera"])
def test_an_adapter_needs_no_permute(method):
    """Inside a pipeline's stage one would never return; the plain model has none on this mesh either."""
    config = tiny(mesh=MESH, adapter={"method": method, "rank": 4})
    mesh = make_mesh(config.mesh)
    found = collectives(build(config, mesh).compiled_step().as_text(), mesh)
    assert found and not [one for one in found if one.kind == "collective-permute"]


def test_only_what_learns_moves():
    """Two layers in one stack, of which one is chosen: the other's weights are bit for bit what they were."""
    config = tiny(adapter={"method": "selective", "targets": ["layers/1/*", "final_norm/*"]})
    before = canonical(jax.device_get(build(config, make_mesh(config.mesh)).initialized().params), config.model)
    after = trajectory(config, steps=3)[1]
    moved = {name for name, array in before.items() if np.any(array != after[f"params/{name}"])}
    assert moved == {name for name in before if name.startswith("layers/1/")} | {"final_norm/scale"}
    assert not any("adapter" in name or name.startswith("opt_state/adamw/mu/embed") for name in after)


def test_the_second_factor_takes_larger_steps():
    """LoRA+ with plain gradient descent: B moves `ratio` times as far as A for the same gradient."""
    config = tiny(adapter={"rank": 4, "ratio": 16.0}, optimizer={"name": "sgd", "b1": 0.0, "clip": None})
    program = build(config, make_mesh(config.mesh))
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), program.shapes.params)
    updates, _ = program.optimizer.update(params, program.optimizer.init(params), params)
    found = updates["segments"]["0"]["0"]["block"]["attn"]["v"]["adapter"]
    assert found["a"].max() < 0
    np.testing.assert_allclose(found["b"].max(), 16 * found["a"].max(), rtol=1e-6)


def model_directory(path):
    """A random Qwen 3 with a byte tokenizer, as a Hugging Face directory."""
    config = tiny(model={"family": "qwen3", "vocab": 384})
    params = jax.jit(lambda: initial_params(config.model, jax.random.key(5)))()
    path.mkdir()
    tree = config_json(config.model, positions=64, dtype="float32")
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
        "data": {"source": "synthetic", "sequence_length": 16, "global_batch": 8},
        "logging": {"every": 1, "tensorboard": False},
        "optimizer": {"schedule": "constant"},
        "mesh": {"platform": "cpu"},
    }
    return validated(tree | changes)


def test_a_run_that_stopped_goes_on_from_its_directory(tmp_path):
    """4 steps at once and 2 + 2 on another mesh end in the same loss; the base is made again, and must be the same."""
    base = model_directory(tmp_path / "base")
    whole = train(tuned(base), world=World(), root=tmp_path / "whole")
    train(tuned(base, steps=2), world=World(), root=tmp_path)
    rest = train(tuned(base, mesh=MESH | {"platform": "cpu"}), world=World(), root=tmp_path)
    assert rest.metrics["held_out_loss"] == pytest.approx(whole.metrics["held_out_loss"], rel=1e-5)

    other = tuned(base, steps=6)
    model = build(other, make_mesh(other.mesh)).weights()
    changed = jax.tree.map(lambda leaf: 1.01 * leaf, combine(model, {}))
    (base / "model.safetensors").unlink()
    huggingface.write(changed, other.model, base, kind="qwen3", limit=10**9)
    with pytest.raises(UserError, match="holds other weights than this run's adapter was trained on"):
        train(other, world=World(), root=tmp_path)
