"""The mesh: axes in order, sizes that must fit, devices that must be there."""

import jax
import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.names import MESH_AXES
from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ({}, {}),
        ({"data": 2, "tensor": 2}, {"data": 2, "tensor": 2}),
        ({"fsdp": -1, "tensor": 2}, {"fsdp": 4, "tensor": 2}),
    ],
)
def test_sizes_and_order(axes, sizes):
    mesh = make_mesh(MeshConfig(**axes, platform="cpu"))
    assert mesh.axis_names == MESH_AXES and dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1) | sizes
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_more_devices_than_there_are_is_the_users_mistake():
    with pytest.raises(UserError, match=r"mesh: 16 devices wanted, 8 cpu device\(s\) found"):
        make_mesh(MeshConfig(data=16, platform="cpu"))


def test_a_platform_without_a_device_is_the_users_mistake(monkeypatch):
    def none():
        raise RuntimeError("Unknown backend cuda\nmore")

    monkeypatch.setattr(jax, "devices", none)
    with pytest.raises(UserError, match=r"mesh.platform: gpu: JAX finds no such device here \(Unknown backend cuda\)"):
        make_mesh(MeshConfig(platform="gpu"))
