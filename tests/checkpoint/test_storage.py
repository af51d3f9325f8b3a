"""Checkpoints are exact, load on any mesh, are not changed by later steps, and are refused by another model."""

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from support.equivalence import batches, make_global_arrays, tiny

from meshwright.checkpoint.async_copy import donation_safe_copy
from meshwright.checkpoint.layout_conversion import make_layout
from meshwright.checkpoint.storage import Storage
from meshwright.configs.errors import MeshwrightError, UserError
from meshwright.parallel.layout import to_canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.program import build


class Run:
    """A tiny run's program, state and compiled step on one mesh."""

    def __init__(self, **changes):
        self.config = tiny(**changes)
        self.program = build(self.config, make_mesh(self.config.mesh))
        self.step = self.program.compiled_step()
        self.state = self.program.initialize()

    def go(self, first, last):
        for batch in batches(self.config, last)[first:last]:
            self.state, _ = self.step(self.state, make_global_arrays(batch, self.config, self.program.mesh))
        return self

    def arrays(self):
        return jax.device_get(to_canonical(self.state, self.config.model))


def open_storage(directory, **changes):
    return Storage(directory, layout=make_layout(tiny(**changes).model))


@pytest.fixture(scope="module")
def sharded():
    return Run(mesh={"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture(scope="module")
def saved(sharded, tmp_path_factory):
    """A directory with the state after two steps, saved while a third ran; and what the state was."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    sharded.go(0, 2)
    before = jax.tree.map(np.array, sharded.arrays())
    storage = open_storage(directory)
    storage.save(donation_safe_copy(sharded.state), step=2, data={"samples": 16})
    sharded.go(2, 4)  # donates the arrays whose copy is being written
    storage.close()
    return directory, before


def test_later_steps_do_not_change_a_save(saved, sharded):
    directory, before = saved
    storage = open_storage(directory)
    state, data = storage.restore(2, shapes=sharded.program.shapes, shardings=sharded.program.shardings)
    assert data == {"samples": 16} and storage.steps == [2]
    jax.tree.map(np.testing.assert_array_equal, to_canonical(state, sharded.config.model), before)


def test_resuming_on_another_mesh_continues_the_same_trajectory(saved, sharded):
    directory, _ = saved
    other = Run(mesh={"fsdp": 2, "zero": 1})
    storage = open_storage(directory)
    other.state, _ = storage.restore(2, shapes=other.program.shapes, shardings=other.program.shardings)
    other.go(2, 4)
    for name, array in sharded.arrays().items():
        np.testing.assert_allclose(other.arrays()[name], array, atol=2e-5, rtol=1e-4, err_msg=name)


def test_a_checkpoint_of_another_model_is_refused_by_name(saved):
    directory, _ = saved
    other = build(tiny(model={"mlp": 32}), make_mesh(tiny().mesh))
    with pytest.raises(UserError, match=r"checkpoint 2: .*mlp.* \(24, 16\) float32 .*\(32, 16\) float32"):
        open_storage(directory).restore(2, shapes=other.shapes, shardings=other.shardings)


LAYOUTS = {
    "another padding": {"model": {"vocab_multiple": 96}, "mesh": {"fsdp": 2, "tensor": 2}},
    "other stacks": {"model": {"windows": [None, None]}},
}


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
def test_a_checkpoint_of_another_layout_loads_by_canonical_names(saved, changes):
    """Vocabulary 61 padded to 64 and layers in one stack: loads padded to 96, and with a stack for each layer."""
    directory, before = saved
    config = tiny(**changes)
    program = build(config, make_mesh(config.mesh))
    state, data = open_storage(directory, **changes).restore(2, shapes=program.shapes, shardings=program.shardings)
    after = jax.device_get(to_canonical(state, config.model))
    assert data == {"samples": 16} and after.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == program.shardings


def test_a_failed_save_raises_and_keeps_earlier_checkpoints(sharded, tmp_path, monkeypatch):
    storage = open_storage(tmp_path / "checkpoints")
    storage.save(sharded.state, step=1, data={})
    storage.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp, "save_async", full)
    with pytest.raises(UserError, match=r"checkpoint 2 .*free some space"):
        storage.save(sharded.state, step=2, data={})
        storage.wait()
    assert storage.steps == [1]


def test_a_damaged_checkpoint_is_not_restored(sharded, tmp_path):
    storage = open_storage(tmp_path / "checkpoints")
    storage.save(sharded.state, step=1, data={})
    storage.wait()
    for file in (tmp_path / "checkpoints").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(MeshwrightError, match=r"checkpoint 1 .* cannot be read"):
        storage.restore(1, shapes=sharded.program.shapes, shardings=sharded.program.shardings)
