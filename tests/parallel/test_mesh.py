"""The mesh: axes in a fixed order, sizes that must fit, devices that must exist."""

import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.names import MESH_AXES
from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel.mesh import make_mesh, order_devices


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


def tpu_slice(*shape, number=0):
    """Devices of a v5p slice of `shape`, as JAX describes them."""
    return [
        SimpleNamespace(
            id=number * 1000 + place, platform="tpu", device_kind="TPU v5", coords=coordinates, core_on_chip=0,
            process_index=number, slice_index=number,
        )
        for place, coordinates in enumerate(np.ndindex(shape))
    ]  # fmt: skip


def axes_of(**sizes):
    return dict.fromkeys(MESH_AXES, 1) | sizes


def test_neighbours_along_an_axis_are_linked():
    grid = order_devices(tpu_slice(4, 4, 4), axes_of(fsdp=16, tensor=4)).reshape(16, 4)
    for row in grid:
        places = np.array([device.coords for device in row])
        assert (np.ptp(places, axis=0) > 0).sum() == 1  # each tensor group is one axis of the torus


def test_devices_that_fill_no_box_keep_their_order_with_a_warning(caplog):
    devices = tpu_slice(4, 4, 4)[:24]
    with caplog.at_level(logging.WARNING):
        grid = order_devices(devices, axes_of(fsdp=24))
    assert grid.ravel().tolist() == devices and "24 devices fill no box" in caplog.text


def test_slices_lie_along_replica_then_data():
    devices = [device for number in range(4) for device in tpu_slice(2, 2, 2, number=number)]
    grid = order_devices(devices, axes_of(replica=2, data=2, fsdp=8)).reshape(2, 2, 8)
    assert [[{device.slice_index for device in group} for group in row] for row in grid] == [[{0}, {1}], [{2}, {3}]]
    with pytest.raises(UserError, match=r"mesh: 4 slices.* set mesh.data to a multiple of 4"):
        order_devices(devices, axes_of(data=2, fsdp=16))
