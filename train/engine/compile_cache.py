"""A compilation cache for the processes that JAX's own cache leaves out.

JAX caches what process 0 compiles, and on a CPU the key of an entry contains the process. So every other process of a
job compiled everything again at each restart, and all of them waited for the slowest. This cache is next to JAX's own.

    step = compile_cached(jax.jit(f).lower(*shapes), mesh)
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
from ..data.disk_cache import cache_entry

logger = logging.getLogger(__name__)


def compile_cached(lowered: jax.stages.Lowered, mesh: Mesh) -> jax.stages.Compiled:
    """Compile `lowered`, a program over `mesh`, or load what the same process of an earlier session compiled."""
    directory = jax.config.jax_compilation_cache_dir
    if directory is None or jax.process_index() == 0 or mesh.devices.flat[0].platform != "cpu":
        return lowered.compile()
    compiled: jax.stages.Compiled | None = None

    def write(entry: Path) -> None:
        nonlocal compiled
        compiled = lowered.compile()
        (entry / "executable").write_bytes(serialize(compiled)[0])

    def read(entry: Path) -> jax.stages.Compiled:
        if compiled is not None:
            return compiled
        payload, devices = (entry / "executable").read_bytes(), list(mesh.devices.flat)
        return deserialize_and_load(payload, lowered.in_tree, lowered.out_tree, execution_devices=devices)

    try:
        return cache_entry(Path(directory) / "other-processes" / cache_key(lowered, mesh), read=read, write=write)
    except UserError as error:  # it cannot be written, which only costs time at the next start
        logger.warning("%s", error)
        return lowered.compile() if compiled is None else compiled


def cache_key(lowered: jax.stages.Lowered, mesh: Mesh) -> str:
    """128 bits of everything the executable depends on: program, compiler, flags, process, devices of the mesh."""
    devices = [device.id for device in mesh.devices.flat]
    process = f"{jax.process_index()} of {jax.process_count()}, {devices}"
    parts = (lowered.as_text(), jax.__version__, jaxlib.__version__, os.environ.get("XLA_FLAGS", ""), process)
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())
