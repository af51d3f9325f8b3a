"""The plan of a run, before its first step: size and sharding of every array, memory and FLOPs of the compiled step.

plan = make_plan(program, program.compiled_step())     # a dict, ready for JSON; nothing is allocated

Bytes are exact; `bytes_per_device` is the largest share of a device. `compiled` is the compiler's memory analysis of
one device; `flops_per_step` counts the matrix products of the traced step on all devices, recomputation included;
`collectives` is what a device receives per step, by kind and by the mesh axes that it crosses. `count` is the number of
parameters of one replica. `offloaded_bytes`, of all devices together, is what the traced step keeps in host memory: the
compiler for CPUs, which have one kind of memory, counts it among the temporaries; that for GPUs reports `host_bytes` of
a device.
"""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from rich.console import Group, RenderableType
from rich.table import Table

from ...configs.run import RunConfig
from ...configs.sections.adapter import SPARSE_METHODS
from ...configs.sections.parallel import MeshConfig, PipelineConfig
from ...configs.sections.quantization import BITS, QuantizationConfig
from ...memory.jaxpr_stats import host_bytes, matmul_flops
from ...models.flops import flops_per_token
from ...parallel.hlo.collectives import bytes_by_axes, collectives
from ...parallel.mesh import make_mesh
from ...parallel.outer.traffic import traffic_summary
from ...parallel.sharding import path_name
from ..engine.program import Program, build
from ..engine.replicas import Replicas
from ..objectives.distillation import teacher_of

LARGEST = 8  # arrays shown
DENSE_GRADIENT = (*SPARSE_METHODS, "shira")  # methods that compute the gradient of whole weights


def make_plan(program: Program, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Return the plan of `program`; `compiled` is its `compiled_step()`."""
    received = bytes_by_axes(collectives(compiled.as_text(), program.mesh))
    return storage_plan(program) | {
        "compiled": memory(compiled) | {"flops_per_step": step_flops(program)} | offload_plan(program),
        "collectives": {kind: dict(sorted(axes.items())) for kind, axes in sorted(received.items())},
        "devices": [
            {"id": device.id, "kind": device.device_kind, "platform": device.platform, "process": device.process_index}
            for device in program.mesh.devices.flat
        ],
    }


def storage_plan(program: Program) -> dict[str, Any]:
    """Return the part of a plan that needs no devices and no compiler, and is the same for every version of them."""
    arrays = [
        array_entry(f"{part}/{path_name(path)}", leaf, sharding)
        for part in ("params", "frozen", "opt_state", "outer")
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(getattr(program.shapes, part)),
            jax.tree.leaves(getattr(program.shardings, part)),
            strict=True,
        )
    ]
    state = [array for array in arrays if array["name"].startswith(("opt_state/", "outer/"))]
    weights = [array for array in arrays if array not in state and not array["name"].startswith("frozen/teacher/")]
    replicas = program.replicas.count if isinstance(program.replicas, Replicas) else 1
    plan = {
        "parameters": {"count": count_weights(weights, program.config.quantization) // replicas, **totals(weights)},
        "optimizer": totals(state),
        "arrays": [{key: value for key, value in array.items() if key != "bytes"} for array in arrays],
        "mesh": dict(program.mesh.shape),
        "model_flops_per_token": training_flops(program.config),
    }
    if program.replicas:
        plan["outer"] = traffic_summary(program.traffic, program.array_shapes, replicas=program.replicas.count)
    return plan


def training_flops(config: RunConfig) -> float:
    """FLOPs per token of a training step, the forward pass of a teacher included."""
    length, teacher = config.data.sequence_length, teacher_of(config)
    frozen = config.adapter is not None and config.adapter.method not in DENSE_GRADIENT
    flops = flops_per_token(config.model, length, frozen=frozen)
    return flops if teacher is None else flops + flops_per_token(teacher, length) / 3


def count_weights(weights: list[dict[str, Any]], quantization: QuantizationConfig | None) -> int:
    """The number of weights; a quantized array has as many as its codes hold."""
    sizes = {array["name"]: math.prod(array["shape"]) for array in weights}
    if quantization is None:
        return sum(sizes.values())
    codes = sum(size for name, size in sizes.items() if name.endswith("/kernel/codes"))
    return codes * 8 // BITS[quantization.format] + sum(size for name, size in sizes.items() if "/kernel/" not in name)


def array_entry(name: str, leaf: Any, sharding: NamedSharding) -> dict[str, Any]:
    """The entry of an array: `spec` has the mesh axis, axes or null of each dimension; a padded vocabulary counts."""
    spec = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]
    return {
        "name": name,
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "spec": [list(axes) if isinstance(axes, tuple) else axes for axes in spec],
        "bytes": math.prod(leaf.shape) * leaf.dtype.itemsize,
        "bytes_per_device": math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
    }


def totals(arrays: list[dict[str, Any]]) -> dict[str, int]:
    """Sum `bytes` and `bytes_per_device`."""
    return {key: sum(array[key] for array in arrays) for key in ("bytes", "bytes_per_device")}


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The compiler's memory analysis of one device; `alias_bytes` are outputs written into donated arguments."""
    stats = compiled.memory_analysis()
    sizes = {
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "temporary_bytes": stats.temp_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
        "host_bytes": stats.host_temp_size_in_bytes,
    }
    peak = sizes["argument_bytes"] + sizes["output_bytes"] + sizes["temporary_bytes"] - sizes["alias_bytes"]
    return sizes | {"peak_bytes": peak}


def step_flops(program: Program) -> int:
    """Count the matrix-product FLOPs of a training step on all devices from its trace, times the lengths of loops.

    A trace does not show the work of a pipeline, which is in its table, nor how often the loop of
    `elastic.deterministic` runs. Together the devices do what one device would do, whose step is counted instead.
    """
    if program.pipeline_plan is not None or program.config.elastic.deterministic:
        program = single_device(program)
    with jax.set_mesh(program.mesh):
        return matmul_flops(jax.make_jaxpr(program.step)(program.shapes, program.batch_shapes))


def offload_plan(program: Program) -> dict[str, int]:
    """Bytes in host memory while the step runs; {} if no policy offloads."""
    if not program.config.memory.offloads:
        return {}
    with jax.set_mesh(program.mesh):
        return {"offloaded_bytes": host_bytes(jax.make_jaxpr(program.step)(program.shapes, program.batch_shapes))}


def single_device(program: Program) -> Program:
    """Build the same run for one device."""
    mesh = MeshConfig(platform=program.config.mesh.platform)
    elastic = program.config.elastic.model_copy(update={"deterministic": False})
    config = program.config.model_copy(update={"mesh": mesh, "pipeline": PipelineConfig(), "elastic": elastic})
    return build(config, make_mesh(config.mesh, devices=program.mesh.devices.flat[:1].tolist()))


def render(plan: dict[str, Any]) -> RenderableType:
    """Two tables of `plan`: memory and communication of a device, and the largest arrays."""
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    parameters, optimizer, compiled = plan["parameters"], plan["optimizer"], plan["compiled"]
    table = Table(title=f"Plan: {axes}", title_justify="left", show_header=False)
    table.add_row("parameters", f"{parameters['count']:,}", f"{size(parameters['bytes_per_device'])} a device")
    if (trained := trained_count(plan)) != parameters["count"]:
        table.add_row("trained", f"{trained:,}", f"{trained / parameters['count']:.2%} of them")
    table.add_row("optimizer", size(optimizer["bytes"]), f"{size(optimizer['bytes_per_device'])} a device")
    table.add_row("temporaries", "activations, gradients", f"{size(compiled['temporary_bytes'])} a device")
    if "offloaded_bytes" in compiled:
        table.add_row("offloaded", "in host memory", f"{size(compiled['offloaded_bytes'])} of all devices")
    table.add_row("peak", "with arguments", f"{size(compiled['peak_bytes'])} a device")
    table.add_row("step", "matrix products", f"{compiled['flops_per_step'] / 1e12:.3g} TFLOP")
    for kind, by_axes in plan["collectives"].items():
        for crossed, count in by_axes.items():
            if crossed != "none":  # between no two devices
                table.add_row(kind, f"over {crossed}", f"{size(count)} a device and step")
    if outer := plan.get("outer"):
        table.add_row(
            "replicas",
            f"send {size(outer['bytes_per_update'])} each an update",
            f"{outer['times_fewer_bytes']:.4g}x less than gradients; at most {size(outer['peak_bytes'])} at once",
        )
    return Group(table, largest_arrays(plan["arrays"]))


def trained_count(plan: dict[str, Any]) -> int:
    """The number of trained weights of one replica."""
    sizes = (math.prod(array["shape"]) for array in plan["arrays"] if array["name"].startswith("params/"))
    return sum(sizes) // plan["mesh"].get("replica", 1)


def largest_arrays(arrays: list[dict[str, Any]]) -> Table:
    """A table of the largest arrays of a device, with the mesh axes of each dimension."""
    table = Table("array", "shape", "sharding", "a device", title="Largest arrays", title_justify="left")
    # Of arrays of one size, weights come first.
    is_weight = lambda name: name.startswith(("params/", "frozen/"))
    arrays = sorted(arrays, key=lambda array: (-array["bytes_per_device"], not is_weight(array["name"]), array["name"]))
    for array in arrays[:LARGEST]:
        spec = ", ".join("+".join(axes) if isinstance(axes, list) else axes or "·" for axes in array["spec"])
        name = array["name"] if len(array["name"]) <= 32 else f"…{array['name'][-31:]}"
        table.add_row(name, " x ".join(map(str, array["shape"])), spec, size(array["bytes_per_device"]))
    return table


def size(count: float) -> str:
    """Bytes as text: `size(1536)` is '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
