"""`meshwright doctor`: is this machine fit to train on, and what is missing for what?

    examination = examine_machine()  # checks every device: all-reduce and offload, both compared with what is right
    print(json.dumps(dataclasses.asdict(examination)))
    exit_code(examination)           # 1 where a device computed or kept wrong numbers

Nothing here needs an optional package: one that does not import is a problem with a remedy.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from ..data.disk_cache import cache_directory
from ..report.markup import format_bytes
from .findings import Check, Device, Examination, Extra, Host, Problem
from .machine_view import render

PACKAGES = (
    "meshwright", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "tokenizers",
    "safetensors", "pydantic", "numpy", "scipy", "matplotlib", "tensorboardX",
)  # fmt: skip

# Extra of the package -> (the distributions that it brings, what they are for). A trailing * stands for any ending.
EXTRAS = {
    "gpu": (("jax-cuda*-plugin",), "NVIDIA GPUs"),
    "interop": (("torch", "transformers", "peft"), "comparing with PyTorch models and benchmarks"),
    "privacy": (("jax-privacy",), "differentially private training"),
    "ray": (("ray",), "launching on a Ray cluster"),
    "slurm": (("submitit",), "launching on a SLURM cluster"),
    "targets": (("libtpu",), "compiling for TPUs that are not here, with `plan --target`"),
    "tpu": (("libtpu",), "TPUs"),
    "wandb": (("wandb",), "logging.wandb"),
}

# Instruction sets that decide how fast matrices multiply on a CPU.
CPU_FEATURES = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")

LOW_DISK = 2 * 2**30  # bytes; a checkpoint of a 34M model with Adam's moments takes 0.4 GiB, and three are kept
ARRAY_ELEMENTS = 1 << 18  # of the array each device contributes: 1 MiB of float32


def main(*, as_json: bool = False) -> int:
    """Examine this machine and print the result. Returns the exit code."""
    import json

    from rich.console import Console

    simulate_devices()
    examination = examine_machine()
    if as_json:
        print(json.dumps(asdict(examination), indent=1))
    else:
        Console().print(render(examination))
    return exit_code(examination)


def simulate_devices(count: int = 8) -> None:
    """Have a CPU pass for `count` devices, so that collectives have something to do; accelerators are not affected."""
    try:
        import jax

        if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", count)
    except (ImportError, RuntimeError):
        pass  # no JAX, which the examination reports, or its devices are initialized already


def examine_machine() -> Examination:
    """Everything about this machine. Takes seconds; writes nothing."""
    devices, failure = list_devices()
    checks = (check_all_reduce(devices), check_offload(devices)) if devices else ()
    examination = Examination(
        versions={name: installed_version(name) for name in PACKAGES},
        host=describe_host(),
        devices=tuple(map(describe_device, devices)),
        checks=checks,
        extras=tuple(describe_extra(name) for name in EXTRAS),
    )
    return replace(examination, problems=(*failure, *find_problems(examination)))


def exit_code(examination: Examination) -> int:
    """1 where a check came out wrong, else 0: what is merely missing is for the reader to weigh."""
    return int(any(check.outcome == "wrong" for check in examination.checks))


def list_devices() -> tuple[list[Any], tuple[Problem, ...]]:
    """Every device, or the reason why there is none."""
    try:
        import jax

        return list(jax.devices()), ()
    except ImportError as error:
        return [], (Problem(f"JAX does not import: {error}", "pip install meshwright"),)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return [], (Problem(f"no device: {reason}", "set JAX_PLATFORMS=cpu, or install the driver this jaxlib needs"),)


def describe_device(device: Any) -> Device:
    """A JAX device as a value for JSON."""
    statistics = device.memory_stats() or {}
    return Device(
        id=device.id,
        kind=device.device_kind,
        platform=device.platform,
        process=device.process_index,
        memory_kinds=tuple(memory.kind for memory in device.addressable_memories()),
        memory_bytes=statistics.get("bytes_limit"),
    )


def check_all_reduce(devices: Sequence[Any], *, reduce: Callable[[Any, str], Any] | None = None) -> Check:
    """Sum an array over all devices and compare every device's copy with the exact sum, which float32 can hold.

    `reduce` maps (the array of a device, axis) to the sum over the axis; default `jax.lax.psum`.
    """
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.sharding.Mesh(np.array(devices), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    # Whole numbers below 2**24 / devices: no order of additions rounds.
    parts = np.arange(len(devices) * ARRAY_ELEMENTS).reshape(len(devices), ARRAY_ELEMENTS) % 1021
    shards = jax.device_put(parts.astype(np.float32), NamedSharding(mesh, PartitionSpec("all")))
    summed = jax.jit(
        jax.shard_map(
            lambda part: (reduce or jax.lax.psum)(part, "all"),
            mesh=mesh,
            in_specs=PartitionSpec("all"),
            out_specs=PartitionSpec("all"),
            check_vma=False,
        )
    )
    seconds, result = time_best(lambda: summed(shards))
    wrong = [shard.device.id for shard in result.addressable_shards if not np.array_equal(shard.data[0], parts.sum(0))]
    name = f"all-reduce of {format_bytes(4 * ARRAY_ELEMENTS)} over {len(devices)} devices"
    if wrong:
        return Check(name, "wrong", f"devices {', '.join(map(str, wrong))} have another sum", seconds)
    return Check(name, "right", "every copy is the exact sum", seconds)


def check_offload(devices: Sequence[Any]) -> Check:
    """Send an array of each device to the host's pinned memory and back, and compare every bit."""
    import jax
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    name = f"offload of {format_bytes(4 * ARRAY_ELEMENTS)} to pinned host memory and back"
    kinds = [{memory.kind for memory in device.addressable_memories()} for device in devices]
    if not all("pinned_host" in kind for kind in kinds):
        return Check(name, "unavailable", f"memory kinds are {', '.join(sorted(set().union(*kinds)))}")
    value = np.arange(ARRAY_ELEMENTS, dtype=np.float32)

    def offload_and_fetch(device: Any) -> Any:
        on_device = jax.device_put(value, SingleDeviceSharding(device))
        on_host = jax.device_put(on_device, SingleDeviceSharding(device, memory_kind="pinned_host"))
        return jax.device_put(on_host, SingleDeviceSharding(device, memory_kind=device.default_memory().kind))

    seconds, fetched = time_best(lambda: [offload_and_fetch(device) for device in devices])
    wrong = [str(device.id) for device, array in zip(devices, fetched, strict=True) if not np.array_equal(array, value)]
    if wrong:
        return Check(name, "wrong", f"devices {', '.join(wrong)} got back another array", seconds)
    return Check(name, "right", f"exact on {len(devices)} devices", seconds)


def time_best(work: Callable[[], Any], *, repeats: int = 5) -> tuple[float, Any]:
    """(seconds of the fastest of `repeats` calls, the last result), after a call that compiles."""
    import jax

    jax.block_until_ready(work())
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.perf_counter()
        result = jax.block_until_ready(work())
        best = min(best, time.perf_counter() - began)
    return best, result


def describe_host() -> Host:
    """The machine this runs on."""
    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_directory(None) / "compiled")
    return Host(
        system=platform.platform(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_features=read_cpu_features(),
        memory_bytes=psutil.virtual_memory().total,
        disk_free_bytes=shutil.disk_usage(".").free,
        compilation_cache=str(cache),
        compilation_cache_bytes=sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()),
        gloo=has_gloo(),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )


def read_cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, ...]:
    """Those of CPU_FEATURES that the first processor has; () where the system does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return ()
    flag_lines = [line for line in lines if line.lower().startswith(("flags", "features"))]
    flags = flag_lines[0].partition(":")[2].split() if flag_lines else []
    return tuple(feature for feature in CPU_FEATURES if feature in flags)


def has_gloo() -> bool:
    """Whether this jaxlib can connect CPU processes: it has no public way to ask, so look for what builds them."""
    try:
        return hasattr(importlib.import_module("jaxlib._jax"), "make_gloo_tcp_collectives")
    except ImportError:
        return False


def installed_version(name: str) -> str | None:
    """The version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_installed(pattern: str) -> bool:
    """Whether a distribution of this name, or of one that fits a pattern with a *, is installed."""
    if "*" not in pattern:
        return installed_version(pattern) is not None
    from fnmatch import fnmatch

    return any(fnmatch(distribution.name or "", pattern) for distribution in importlib.metadata.distributions())


def describe_extra(name: str) -> Extra:
    """The state of an optional part of the package."""
    distributions, purpose = EXTRAS[name]
    missing = tuple(pattern for pattern in distributions if not is_installed(pattern))
    return Extra(name, purpose, missing, remedy=f"pip install 'meshwright[{name}]'" if missing else "")


def find_problems(examination: Examination, *, nvidia: Path = Path("/dev/nvidia0")) -> list[Problem]:
    """The problems, most important first. `nvidia` is a file that exists where the system has an NVIDIA GPU."""
    problems = [
        Problem(f"{check.name} went wrong: {check.detail}", "do not train here; try another jaxlib, driver or machine")
        for check in examination.checks
        if check.outcome == "wrong"
    ]
    missing = [name for name, version in examination.versions.items() if version is None]
    if missing:
        problems.append(Problem(f"not installed: {', '.join(missing)}", "pip install meshwright"))
    if nvidia.exists() and not any(device.platform in ("gpu", "cuda") for device in examination.devices):
        problems.append(Problem("there is an NVIDIA GPU, and JAX does not use it", "pip install 'meshwright[gpu]'"))
    if (free := examination.host.disk_free_bytes) < LOW_DISK:
        remedy = "make room, or start runs from another directory"
        problems.append(Problem(f"{format_bytes(free)} of disk are left here", remedy))
    problems += [
        Problem(f"{check.name}: {check.detail}", "leave offload out of memory.policy and memory.names")
        for check in examination.checks
        if check.outcome == "unavailable"
    ]
    if not examination.host.gloo:
        problems.append(Problem("this jaxlib has no gloo: CPU processes cannot work together", "pip install -U jaxlib"))
    return problems
