"""The mesh: axes in a fixed order, sizes that must fit, devices that must exist."""

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
def test_axes_have_their_sizes_in_a_fixed_order(axes, sizes):
    mesh = make_mesh(MeshConfig(**axes, platform="cpu"))
    assert mesh.axis_names == MESH_AXES and dict(mesh.shape) == dict.fromkeys(MESH_AXES, 1) | sizes
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_mesh_larger_than_the_devices_is_a_user_error():
    with pytest.raises(UserError, match=r"mesh: .* 16 devices, .* 8 \(cpu\)"):
        make_mesh(MeshConfig(data=16, platform="cpu"))


def test_a_platform_without_a_device_is_a_user_error(monkeypatch):
    def no_devices():
        raise RuntimeError("Unknown backend cuda\nmore")

    monkeypatch.setattr(jax, "devices", no_devices)
    with pytest.raises(UserError, match=r"mesh.platform: gpu, .*\(Unknown backend cuda\)"):
        make_mesh(MeshConfig(platform="gpu"))
