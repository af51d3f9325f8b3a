"""Devices of a machine that is not here, for compiling ahead of time.

    mesh = make_mesh(config.mesh, devices=target_devices(parse_topology("v5p:4x4x4")))

A program that is lowered over such a mesh compiles, and cannot run.
"""

import os

import jax
from jax.experimental import topologies

from ..configs.errors import UserError, first_line
from ..configs.hardware_targets import HardwareTarget, Topology

# libtpu asks the machine where it is, unless told; the values are those of a machine without a TPU.
LIBTPU_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may have loaded it
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}


def prepare_to_compile() -> None:
    """Keep JAX on this machine's CPU, and libtpu from looking for a TPU. Call before any device is touched."""
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def target_devices(topology: Topology) -> list[jax.Device]:
    """The devices of `topology`. Raises UserError if no compiler for them is installed, or it knows no such slice."""
    target = topology.target
    if target.compiler != "libtpu":
        raise UserError(f"--target: {topology}: {_why_not(target)}")
    options = dict(target.topology_options)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    shape = "x".join(map(str, topology.shape))
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{target.topology_name}:{shape}", **options
        )
    except (RuntimeError, ValueError) as error:
        if "not installed" in str(error):
            raise UserError(
                f"--target: {topology} needs libtpu, the compiler for TPUs; pip install 'meshwright[targets]'"
            ) from error
        raise UserError(f"--target: {topology}: libtpu refuses it ({first_line(error)})") from error
    return list(description.devices)


def _why_not(target: HardwareTarget) -> str:
    if target.compiler is None:
        return f"only the numbers of {target.name} are known, no compiler for it; `plan` needs one"
    if target.compiler == "xla-cpu":
        return "this machine compiles for CPUs without --target"
    return f"compiling for {target.name} without a GPU is not supported yet; plan on a machine with one"
