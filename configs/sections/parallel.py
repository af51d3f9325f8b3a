"""The sections mesh, pipeline, sequence, memory and precision: how arrays are sharded, stored and computed."""

import math
from typing import Literal

from pydantic import Field, model_validator

from ..names import MESH_AXES
from .base import MemoryDecision, Section

DTYPE = Literal["float32", "bfloat16", "float16"]

# Axes of the mesh that are not implemented yet.
UNBUILT_AXES = ("expert",)


class AxesConfig(Section):
    """Sizes of the mesh axes, slow links first; 1 by default. Their product is the number of devices; one size may be
    -1, for all remaining devices."""

    replica: int = 1
    """Replicas that train by themselves and synchronize by `outer`. It changes the result, so it cannot be -1."""
    pipe: int = 1
    """Pipeline parallelism: devices that a microbatch passes through, each with its own layers (see `pipeline`)."""
    data: int = 1
    """Data parallelism: the batch is sharded, weights are replicated."""
    fsdp: int = 1
    """Fully sharded data parallelism: the batch is sharded, and weights or optimizer state too (see `zero`)."""
    expert: int = 1
    """Expert parallelism; not implemented yet, leave it at 1."""
    seq: int = 1
    """Context parallelism: the sequence is sharded (see `sequence.parallel`)."""
    tensor: int = 1
    """Tensor parallelism: heads, MLP and vocabulary are sharded; between blocks, the sequence."""

    @model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        for axis, size in self.sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}: {size} must be at least 1, or -1 for all remaining devices")
            if axis in UNBUILT_AXES and size != 1:
                raise ValueError(f"mesh.{axis}: {size} is not supported yet; leave it at 1")
        if self.replica == -1:
            raise ValueError(
                "mesh.replica: -1, but the number of replicas changes the result; write a number of 1 or more"
            )
        if (open_axes := [axis for axis, size in self.sizes.items() if size == -1]) and len(open_axes) > 1:
            raise ValueError(f"mesh: {', '.join(open_axes)} are all -1; write a size for all but one of them")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> size as configured, in mesh order."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def resolve_sizes(self, devices: int) -> dict[str, int]:
        """Axis -> size, with -1 replaced so that the product is `devices`. Raises ValueError where no size fits."""
        sizes = self.sizes
        product = 1
        for size in sizes.values():
            product *= max(size, 1)
        written = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "all axes 1"
        if -1 not in sizes.values():
            if product != devices:
                raise ValueError(f"mesh: {written} is {product} devices, not {devices}; change an axis or mesh.devices")
            return sizes
        if devices % product:
            raise ValueError(f"mesh: {written} is {product} devices or a multiple, not {devices}; change an axis")
        return {axis: devices // product if size == -1 else size for axis, size in sizes.items()}

    @property
    def device_product(self) -> int | None:
        """The product of all sizes; None where one is -1."""
        return None if -1 in self.sizes.values() else math.prod(self.sizes.values())


class MeshConfig(AxesConfig):
    """The device mesh: its axes and devices."""

    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """Kind of devices. cpu simulates `devices` devices in this process; auto: tpu or gpu if there is one, else cpu."""
    devices: int | None = None
    """Number of devices over all processes; null: the product of the axes, or every device if an axis is -1."""
    zero: Literal[1, 3] = 3
    """ZeRO stage, what `fsdp` shards: 3 parameters, gradients and optimizer state; 1 optimizer state only
    (arXiv:1910.02054)."""
    compiler_options: dict[str, str | int | float | bool | None] = {}
    """Options of XLA's compiler for every program of the run, on top of those of the hardware target; null removes one
    of these."""

    @model_validator(mode="after")
    def _fits_devices(self) -> "MeshConfig":
        if self.devices is not None:
            self.resolve_sizes(self.devices)
        return self

    @property
    def device_count(self) -> int | None:
        """`devices`, or the product of the axes; None where only the machine decides."""
        return self.device_product if self.devices is None else self.devices


class PipelineConfig(Section):
    """Pipeline parallelism over `mesh.pipe` devices; no effect where that is 1."""

    schedule: str = "1f1b"
    """Name of a schedule (`meshwright schedule` lists them), or a .csv file with its table."""
    chunks: int | None = Field(None, ge=1)
    """Stages (model chunks) per device; null: the schedule's default."""
    vocab_parallel: Literal[0, 1, 2] = 0
    """Vocabulary parallelism. 0: embedding on the first stage, head on the last; 1, 2: both sharded over all stages, by
    Algorithm 1 or 2 (arXiv:2411.05288)."""
    layers: list[int] | Literal["even", "balanced"] = "even"
    """Layers of each stage, or how to divide them: evenly, or balanced, with fewer on the stage that has the head."""
    backward: Literal["split", "fused"] = "split"
    """split: input and weight gradients are separate passes; fused: one pass, twice as long, that stashes nothing."""
    post_validation: bool = False
    """Update before the global gradient norm is known, and repeat the update if the norm demands clipping or skipping
    (arXiv:2401.10241); keeps the old state until then."""
    measure: bool = True
    """After the last step, time each op by itself for the report; compiles the engine twice more."""
    memory_limit: float | None = Field(None, gt=0)
    """Activations that a device may hold at once, in microbatches (schedule auto); null: no limit."""


class SequenceConfig(Section):
    """Attention over a sequence that `mesh.seq` shards."""

    parallel: Literal["all-gather", "ring", "ulysses"] = "all-gather"
    """all-gather: gather keys and values; ring: pass them around; ulysses: shard heads instead of tokens."""


class MemoryConfig(Section):
    """Which tensors the backward pass reads from memory, recomputes, or fetches from the host."""

    policy: Literal["none", "full", "attention-out", "minimal", "offload-block-in"] = "none"
    """Preset: none keeps everything, full recomputes each block; the others are defined in `memory/policy.py`."""
    names: dict[str, MemoryDecision] = {}
    """Tensor name -> keep | recompute | offload, on top of `policy`; a name that no block emits is an error."""
    loss_chunks: int = 1
    """Number of slices of the sequence over which head and loss run, so that logits exist for one slice at a time."""

    @property
    def offloads(self) -> bool:
        """Whether any tensor is offloaded to the host."""
        preset: dict[str, MemoryDecision] = {"block_in": "offload"} if self.policy == "offload-block-in" else {}
        return "offload" in (preset | self.names).values()


class PrecisionConfig(Section):
    """Number formats."""

    parameters: DTYPE = "float32"
    """Stored weights; the optimizer's state is always float32."""
    compute: DTYPE = "float32"
    """Matrix products and activations; softmax, norms and losses are always float32."""
    gradients: DTYPE = "float32"
    """Sums of gradients over microbatches and devices."""
