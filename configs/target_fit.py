"""Whether a run fits the devices of a hardware target, as far as no compiler is needed for it. JAX-free."""

import math

from .checks.mesh_fit import check_mesh_fit
from .errors import UserError
from .hardware_targets import Topology
from .loader import load_config
from .run import RunConfig

LANES = 128  # columns of a TPU's registers: a shard of fewer is padded to them


def config_for_target(config: str, overrides: list[str], topology: Topology) -> RunConfig:
    """Load `config` for all devices of `topology`. Raises UserError where its mesh does not fit them."""
    devices = [f"mesh.platform={topology.target.platform}", f"mesh.devices={topology.devices}"]
    try:
        loaded = load_config(config, overrides=[*overrides, *devices])
        check_mesh_fit(loaded, loaded.mesh.resolve_sizes(topology.devices))
    except (UserError, ValueError) as error:
        raise UserError(f"--target {topology}: {error}") from None
    return loaded


def target_warnings(config: RunConfig, topology: Topology) -> list[str]:
    """What will be slow on `topology` because of the shapes of the run, with a remedy; [] if nothing is known."""
    if topology.target.platform != "tpu":
        return []
    sizes = config.mesh.resolve_sizes(topology.devices)
    columns = config.model.embed // sizes["fsdp"] if config.mesh.zero == 3 else config.model.embed
    warnings = []
    if sizes["fsdp"] > 1 and columns < LANES:
        largest = math.gcd(sizes["fsdp"], config.model.embed // LANES)
        warnings.append(
            f"mesh.fsdp: {sizes['fsdp']} leaves {columns} of {config.model.embed} columns (model.embed) on a device; "
            f"under {LANES} a gather becomes a padded all-reduce of twice the bytes. Try mesh.fsdp={largest} "
            f"mesh.data={sizes['data'] * sizes['fsdp'] // largest}"
        )
    return warnings
