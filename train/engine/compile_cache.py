"""Compiled programs kept between runs for the processes that JAX's own cache leaves out.

JAX keeps what process 0 compiles, and on a CPU the key of an entry tells of its process: every other process of a job
compiled all of it again at each restart, and all of them waited for the slowest. Theirs are kept beside JAX's own.

    step = compiling.compiled(jax.jit(f).lower(*shapes), mesh)
"""

import logging
import os
from pathlib import Path

import jax
import jaxlib
import xxhash
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

from ...configs.errors import UserError
from ..data.disk_cache import cached

logger = logging.getLogger(__name__)


def compile_cached(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """`lowered`, a program over `mesh`, compiled here or by this process of an earlier run."""
    directory = jax.config.jax_compilation_cache_dir
    if directory is None or jax.process_index() == 0 or mesh.devices.flat[0].platform != "cpu":
        return lowered.compile()
    made: list[jax.stages.Compiled] = []

    def write(entry: Path) -> None:
        made.append(lowered.compile())
        (entry / "executable").write_bytes(serialize(made[0])[0])

    def read(entry: Path) -> jax.stages.Compiled:
        if made:
            return made[0]
        payload, devices = (entry / "executable").read_bytes(), list(mesh.devices.flat)
        return deserialize_and_load(payload, lowered.in_tree, lowered.out_tree, execution_devices=devices)

    try:
        return cached(Path(directory) / "other-processes" / cache_key(lowered, mesh), read=read, write=write)
    except UserError as error:  # it cannot be kept, which costs time at the next start and nothing else
        logger.warning("%s", error)
        return made[0] if made else lowered.compile()


def cache_key(lowered: jax.stages.Lowered, mesh: Mesh) -> str:
    """128 bits of all that the executable depends on: program, compiler, flags, this process, the mesh's devices."""
    devices = [device.id for device in mesh.devices.flat]
    place = f"{jax.process_index()} of {jax.process_count()}, {devices}"
    told = (lowered.as_text(), jax.__version__, jaxlib.__version__, os.environ.get("XLA_FLAGS", ""), place)
    return xxhash.xxh3_128_hexdigest("\n".join(told).encode())
