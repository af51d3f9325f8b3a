"""The plan of a run, before its first step: what every array weighs and where it lives, what the compiled step needs.

plan = make_plan(program, program.compiled_step())     # a dict, ready for JSON; nothing is allocated

Bytes are exact: `..._per_device` is the largest share of a device. `compiled` is the compiler's word about one device,
`flops_per_step` the matrix products of the traced step on all devices, recomputation included, and `collectives` what a
device receives per step, by kind and the mesh axes it crosses. `count` is the parameters of one replica.
`offloaded_bytes`, of all devices together, is what the traced step keeps in host memory. The compiler for a CPU, which
has one kind of memory, counts it among the temporaries; that for a GPU says `host_bytes` of a device.
"""

import math
from collections.abc import Iterable
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
from ...parallel.hlo import bytes_by_axes, collectives
from ...parallel.mesh import make_mesh
from ...parallel.outer.traffic import traffic_summary
from ...parallel.sharding import path_name
from ..engine.program import Program, build
from ..engine.replicas import Replicas
from ..objectives.distillation import teacher_of

LARGEST = 8  # arrays shown
DENSE = (*SPARSE_METHODS, "shira")  # adapters that make the gradient of whole weights


def make_plan(program: Program, compiled: jax.stages.Compiled) -> dict[str, Any]:
    """Everything known about the step of `program` before it runs; `compiled` is its `compiled_step()`."""
    found = collectives(compiled.as_text(), program.mesh)
    return storage_plan(program) | {
        "compiled": memory(compiled) | {"flops_per_step": step_flops(program)} | offload_plan(program),
        "collectives": {kind: dict(sorted(axes.items())) for kind, axes in sorted(bytes_by_axes(found).items())},
        "devices": [
            {"id": device.id, "kind": device.device_kind, "platform": device.platform, "process": device.process_index}
            for device in program.mesh.devices.flat
        ],
    }


def storage_plan(program: Program) -> dict[str, Any]:
    """The part of a plan that needs neither devices nor a compiler: the same for every version of either."""
    arrays = [
        described(f"{part}/{path_name(path)}", leaf, sharding)
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
    return {
        "parameters": {"count": count(weights, program.config.quantization) // replicas, **totals(weights)},
        "optimizer": totals(state),
        "arrays": [{key: value for key, value in array.items() if key != "bytes"} for array in arrays],
        "mesh": dict(program.mesh.shape),
        "model_flops_per_token": training_flops(program.config),
    } | outer_plan(program)


def training_flops(config: RunConfig) -> float:
    """FLOPs of a token in a step, the forward pass of a teacher that stands beside the model included."""
    length, teacher = config.data.sequence_length, teacher_of(config)
    frozen = config.adapter is not None and config.adapter.method not in DENSE
    own = flops_per_token(config.model, length, frozen=frozen)
    return own if teacher is None else own + flops_per_token(teacher, length) / 3


def count(weights: list[dict[str, Any]], quantization: QuantizationConfig | None) -> int:
    """How many weights there are: quantized ones are as many as their codes."""
    sizes = {array["name"]: math.prod(array["shape"]) for array in weights}
    if quantization is None:
        return sum(sizes.values())
    codes = sum(size for name, size in sizes.items() if name.endswith("/kernel/codes"))
    return codes * 8 // BITS[quantization.format] + sum(size for name, size in sizes.items() if "/kernel/" not in name)


def outer_plan(program: Program) -> dict[str, Any]:
    """What the replicas will send each other; nothing where there is one."""
    if not program.replicas:
        return {}
    return {"outer": traffic_summary(program.traffic, program.array_shapes, replicas=program.replicas.count)}


def described(name: str, leaf: Any, sharding: NamedSharding) -> dict[str, Any]:
    """One array: `spec` holds the mesh axis, axes or null of each dimension. Padding of the vocabulary is included."""
    spec = [*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec))]
    return {
        "name": name,
        "shape": list(leaf.shape),
        "dtype": str(leaf.dtype),
        "spec": [list(axes) if isinstance(axes, tuple) else axes for axes in spec],
        "bytes": math.prod(leaf.shape) * leaf.dtype.itemsize,
        "bytes_per_device": math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
    }


def totals(arrays: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Summed `bytes` and `bytes_per_device`."""
    arrays = list(arrays)
    return {key: sum(array[key] for array in arrays) for key in ("bytes", "bytes_per_device")}


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """The compiler's memory analysis of one device. `alias_bytes` are outputs written into donated arguments."""
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
    """Matrix-product FLOPs of one training step on all devices, read off its trace, loops multiplied through.

    What a pipeline's devices do is in its table and not in the trace, and the loop of `elastic.deterministic` hides its
    turns; together they do what one device would.
    """
    if program.pipeline_plan is not None or program.config.elastic.deterministic:
        program = alone(program)
    with jax.set_mesh(program.mesh):
        return matmul_flops(jax.make_jaxpr(program.step)(program.shapes, program.batch_shapes))


def offload_plan(program: Program) -> dict[str, int]:
    """Bytes in host memory while the step runs; nothing where no policy offloads."""
    if not program.config.memory.offloads:
        return {}
    with jax.set_mesh(program.mesh):
        return {"offloaded_bytes": host_bytes(jax.make_jaxpr(program.step)(program.shapes, program.batch_shapes))}


def alone(program: Program) -> Program:
    """The same run on one device."""
    mesh = MeshConfig(platform=program.config.mesh.platform)
    elastic = program.config.elastic.model_copy(update={"deterministic": False})
    plain = {"mesh": mesh, "pipeline": PipelineConfig(), "elastic": elastic}
    config = program.config.model_copy(update=plain)
    return build(config, make_mesh(config.mesh, devices=jax.local_devices()[:1]))


def render(plan: dict[str, Any]) -> RenderableType:
    """The plan as a short pair of tables: memory and communication of a device, and the largest arrays."""
    axes = " x ".join(f"{axis} {size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    parameters, optimizer, compiled = plan["parameters"], plan["optimizer"], plan["compiled"]
    table = Table(title=f"Plan: {axes}", title_justify="left", show_header=False)
    table.add_row("parameters", f"{parameters['count']:,}", f"{size(parameters['bytes_per_device'])} a device")
    if (learns := trained_count(plan)) != parameters["count"]:
        table.add_row("trained", f"{learns:,}", f"{learns / parameters['count']:.2%} of them")
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
    return Group(table, largest(plan["arrays"]))


def trained_count(plan: dict[str, Any]) -> int:
    """Weights that learn, of one replica."""
    sizes = (math.prod(array["shape"]) for array in plan["arrays"] if array["name"].startswith("params/"))
    return sum(sizes) // plan["mesh"].get("replica", 1)


def largest(arrays: list[dict[str, Any]]) -> Table:
    """The largest arrays of a device, with the mesh axis of each dimension."""
    table = Table("array", "shape", "sharding", "a device", title="Largest arrays", title_justify="left")
    # Of equal ones the weights first.
    ranked = sorted(
        arrays,
        key=lambda one: (-one["bytes_per_device"], not one["name"].startswith(("params/", "frozen/")), one["name"]),
    )
    for array in ranked[:LARGEST]:
        spec = ", ".join("+".join(axes) if isinstance(axes, list) else axes or "·" for axes in array["spec"])
        table.add_row(
            ending(array["name"]), " x ".join(map(str, array["shape"])), spec, size(array["bytes_per_device"])
        )
    return table


def ending(name: str, length: int = 32) -> str:
    """A long path's last `length` characters, which tell it from others: `ending('a/b/c', 3)` is '…/c'."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def size(count: float) -> str:
    """Bytes for people: `size(1536)` is '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
