"""Options of XLA's compiler for programs over a mesh. They travel with a compilation, not by the environment."""

from typing import Any

from jax.sharding import Mesh

from ..configs.hardware_targets import find_target
from ..configs.sections.parallel import MeshConfig


def compiler_options(config: MeshConfig, mesh: Mesh) -> dict[str, Any]:
    """Option -> value: those of the mesh's hardware target, then those of `mesh.compiler_options`."""
    target = find_target(mesh.devices.flat[0].device_kind)
    options = ({} if target is None else target.option_values) | config.compiler_options
    return {name: value for name, value in options.items() if value is not None}
