"""A compilation cache for the processes that JAX's own cache leaves out.

JAX caches what process 0 compiles, and on a CPU the key of an entry contains the process. So every other process of a
job compiled everything again at each restart, and all of them waited for the slowest. This cache is next to JAX's own.

    step = compile_cached(jax.jit(f).lower(*shapes), mesh, options={})
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jaxlib
import xxhash
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

from ...configs.errors import UserError, first_line
from ..data.disk_cache import cache_entry

logger = logging.getLogger(__name__)


def compile_cached(lowered: jax.stages.Lowered, mesh: Mesh, *, options: Mapping[str, Any]) -> jax.stages.Compiled:
    """Compile `lowered`, a program over `mesh`, or load what the same process of an earlier session compiled.

    `options` are the compiler's. Raises UserError if it knows one of them not, or not with this value.
    """
    directory = jax.config.jax_compilation_cache_dir
    if directory is None or jax.process_index() == 0 or mesh.devices.flat[0].platform != "cpu":
        return compile_program(lowered, options)
    compiled: jax.stages.Compiled | None = None

    def write(entry: Path) -> None:
        nonlocal compiled
        compiled = compile_program(lowered, options)
        (entry / "executable").write_bytes(serialize(compiled)[0])

    def read(entry: Path) -> jax.stages.Compiled:
        if compiled is not None:
            return compiled
        payload, devices = (entry / "executable").read_bytes(), list(mesh.devices.flat)
        return deserialize_and_load(payload, lowered.in_tree, lowered.out_tree, execution_devices=devices)

    try:
        return cache_entry(
            Path(directory) / "other-processes" / cache_key(lowered, mesh, options), read=read, write=write
        )
    except UserError as error:  # it cannot be written, which only costs time at the next start
        logger.warning("%s", error)
        return compile_program(lowered, options) if compiled is None else compiled


def compile_program(lowered: jax.stages.Lowered, options: Mapping[str, Any]) -> jax.stages.Compiled:
    """Compile with `options` of the compiler. Raises UserError if it refuses one."""
    try:
        return lowered.compile(compiler_options=dict(options) or None)
    except jax.errors.JaxRuntimeError as error:
        if refused := [name for name in options if name in str(error)]:
            raise UserError(
                f"mesh.compiler_options: {', '.join(refused)}: the compiler refuses it ({first_line(error)}); set it "
                "to null"
            ) from error
        raise


def cache_key(lowered: jax.stages.Lowered, mesh: Mesh, options: Mapping[str, Any]) -> str:
    """128 bits of everything the executable depends on: program, compiler, flags, process, devices of the mesh."""
    devices = [device.id for device in mesh.devices.flat]
    process = f"{jax.process_index()} of {jax.process_count()}, {devices}"
    parts = (lowered.as_text(), jax.__version__, jaxlib.__version__, os.environ.get("XLA_FLAGS", ""), process)
    parts += tuple(f"{name}={value}" for name, value in sorted(options.items()))
    return xxhash.xxh3_128_hexdigest("\n".join(parts).encode())
