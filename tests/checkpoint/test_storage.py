"""Checkpoints: exact, on any mesh, untouched by later steps, refused where they do not fit."""

import jax
import numpy as np
import pytest

from equivalence import batches, tiny, to_devices
from meshwright.checkpoint.storage import Storage
from meshwright.configs.errors import MeshwrightError, UserError
from meshwright.parallel.layout import canonical
from meshwright.parallel.mesh import make_mesh
from meshwright.train.program import build


class Run:
    """A tiny run's program, state and compiled step on one mesh."""

    def __init__(self, **changes):
        self.config = tiny(**changes)
        self.program = build(self.config, make_mesh(self.config.mesh))
        self.step = self.program.compiled_step()
        self.state = self.program.initialized()

    def go(self, first, last):
        for batch in batches(self.config, last)[first:last]:
            self.state, _ = self.step(self.state, to_devices(batch, self.config, self.program.mesh))
        return self

    def arrays(self):
        return jax.device_get(canonical(self.state, self.config.model))


@pytest.fixture(scope="module")
def sharded():
    return Run(mesh={"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture(scope="module")
def saved(sharded, tmp_path_factory):
    """A directory with the state after two steps, saved while a third ran; and what the state was."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    sharded.go(0, 2)
    before = jax.tree.map(np.array, sharded.arrays())
    storage = Storage(directory, keep=2)
    storage.save(sharded.state, step=2, data={"samples": 16})
    sharded.go(2, 4)  # donates the arrays that are being written
    storage.close()
    return directory, before


def test_a_save_is_untouched_by_the_steps_that_follow_it(saved, sharded):
    directory, before = saved
    storage = Storage(directory, keep=2)
    state, data = storage.restore(2, shapes=sharded.program.shapes, shardings=sharded.program.shardings)
    assert data == {"samples": 16} and storage.steps == [2]
    jax.tree.map(np.testing.assert_array_equal, canonical(state, sharded.config.model), before)


def test_resuming_on_another_mesh_goes_on_the_same_trajectory(saved, sharded):
    directory, _ = saved
    other = Run(mesh={"fsdp": 2, "zero": 1})
    storage = Storage(directory, keep=2)
    other.state, _ = storage.restore(2, shapes=other.program.shapes, shardings=other.program.shardings)
    other.go(2, 4)
    for name, array in sharded.arrays().items():
        np.testing.assert_allclose(other.arrays()[name], array, atol=2e-5, rtol=1e-4, err_msg=name)


def test_a_checkpoint_of_another_model_is_refused_by_name(saved):
    directory, _ = saved
    other = build(tiny(model={"mlp": 32}), make_mesh(tiny().mesh))
    with pytest.raises(UserError, match=r"checkpoint 2: .*mlp.* is \(2, 24, 16\) on disk and \(2, 32, 16\) in"):
        Storage(directory, keep=2).restore(2, shapes=other.shapes, shardings=other.shardings)


def test_only_the_newest_survive(sharded, tmp_path):
    storage = Storage(tmp_path / "checkpoints", keep=2)
    for step in (1, 2, 3):
        storage.save(sharded.state, step=step, data={})
    storage.close()
    assert Storage(tmp_path / "checkpoints", keep=2).steps == [2, 3]


def test_a_save_that_fails_is_raised_and_leaves_the_earlier_ones(sharded, tmp_path, monkeypatch):
    storage = Storage(tmp_path / "checkpoints", keep=2)
    storage.save(sharded.state, step=1, data={})
    storage.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage._checkpointer, "save_async", full)
    with pytest.raises(UserError, match=r"checkpoint 2 could not be written.*earlier checkpoints are whole"):
        storage.save(sharded.state, step=2, data={})
    assert storage.steps == [1]


def test_a_damaged_checkpoint_is_not_returned(sharded, tmp_path):
    storage = Storage(tmp_path / "checkpoints", keep=2)
    storage.save(sharded.state, step=1, data={})
    storage.wait()
    for file in (tmp_path / "checkpoints").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(MeshwrightError, match=r"checkpoint 1 .* cannot be read"):
        storage.restore(1, shapes=sharded.program.shapes, shardings=sharded.program.shardings)
