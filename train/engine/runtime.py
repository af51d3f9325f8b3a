"""The runtime of a process: platform, distributed start, compilation cache, and the description of the environment."""

import gzip
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ...configs.run import RunConfig
from ...parallel.mesh import prepare_devices
from ..core.process_env import ProcessInfo
from ..data.assemble import Data
from ..data.dataset import HeldOutDataset
from ..data.disk_cache import cache_directory

PACKAGES = (
    "meshwright", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "tokenizers", "numpy",
)  # fmt: skip


def start(config: RunConfig, process_info: ProcessInfo) -> None:
    """Choose the platform, join the other processes, and turn on the compilation cache.

    Nothing may have touched a device before this call.
    """
    local = process_info.local_devices
    if local is None and process_info.processes > 1 and config.mesh.device_count is not None:
        local = config.mesh.device_count // process_info.processes
    prepare_devices(config.mesh, local_devices=local)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(compilation_cache(config)))
    if process_info.processes > 1 and not jax.distributed.is_initialized():
        # JAX always starts a coordination service in process 0. If an outside one is used, this one gets a port of
        # its own that nobody connects to.
        unused = "127.0.0.1:0" if process_info.external_coordinator and process_info.is_first else None
        jax.distributed.initialize(
            process_info.coordinator, process_info.processes, process_info.process, coordinator_bind_address=unused
        )


def compilation_cache(config: RunConfig) -> Path:
    """Return the directory of compiled programs, one for each processor: XLA:CPU compiles for the one it runs on."""
    return cache_directory(config.data.cache) / "compiled" / f"{platform.machine()}-{processor()}"


def processor() -> str:
    """Return a hash of the processor's model and features, as a name of a directory."""
    import xxhash

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    features = {line for line in lines if line.startswith(("model name", "flags"))}
    return xxhash.xxh3_64_hexdigest("\n".join(sorted(features)).encode())[:8]


def environment(config: RunConfig, data: Data, mesh: Mesh) -> dict[str, Any]:
    """Return the content of environment.json: versions, devices, corpus, tokenizer."""
    corpus: dict[str, Any] = {"fingerprint": data.fingerprint, **data.summary}
    if data.held_out is not None:
        corpus["gzip_bits_per_byte"] = gzip_bits_per_byte(data.held_out)
    return {
        "versions": {name: version for name in PACKAGES if (version := package_version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{device.device_kind} {device.id}" for device in mesh.devices.flat],
        "processes": jax.process_count(),
        "corpus": corpus,
        "tokenizer": {"vocab": data.tokenizer.vocab_size, "fingerprint": data.tokenizer.fingerprint},
        "seed": config.seed,
    }


def package_version(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def gzip_bits_per_byte(held_out: HeldOutDataset) -> float:
    """Return the bits per byte of `gzip -9` over the concatenated held-out documents."""
    text = "".join(held_out.texts()).encode()
    return 8 * len(gzip.compress(text, 9)) / len(text)
