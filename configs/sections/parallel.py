"""Where the arrays live: mesh axes, sequence parallelism, memory policy, precision."""

import math
from typing import Literal

from pydantic import Field, model_validator

from ..names import MESH_AXES
from .base import MemoryDecision, Section

DTYPE = Literal["float32", "bfloat16", "float16"]

# Axes of the mesh that no part of the code shards over yet.
UNBUILT_AXES = ("expert",)


class AxesConfig(Section):
    """Sizes of the mesh axes, slow links first. Their product is the number of devices; one may be -1: what is left."""

    replica: int = 1
    """Replicas that train by themselves and meet as `outer` says; part of what is computed, so never -1."""
    pipe: int = 1
    """Devices a microbatch passes through, each with its own layers (see `pipeline`)."""
    data: int = 1
    """Data parallelism: the batch is split, weights are repeated."""
    fsdp: int = 1
    """Data parallelism with sharded weights or optimizer state (see `zero`)."""
    expert: int = 1
    """Expert parallelism."""
    seq: int = 1
    """Context parallelism: the sequence is split (see `sequence.parallel`)."""
    tensor: int = 1
    """Tensor parallelism: heads, MLP and vocabulary are split; between blocks the sequence is."""

    @model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        for axis, size in self.sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis}: {size} must be at least 1, or -1 for what is left")
            if axis in UNBUILT_AXES and size != 1:
                raise ValueError(f"mesh.{axis}: {size} is not supported yet; leave it at 1")
        if self.replica == -1:
            raise ValueError(f"mesh.replica: {self.replica} would let the machine choose the run; write a number")
        if (open_axes := [axis for axis, size in self.sizes.items() if size == -1]) and len(open_axes) > 1:
            raise ValueError(f"mesh: {', '.join(open_axes)} are all -1; at most one axis may be")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """Axis -> size as written, in mesh order."""
        return {axis: getattr(self, axis) for axis in MESH_AXES}

    def resolve_sizes(self, devices: int) -> dict[str, int]:
        """Axis -> size with -1 filled in so that the product is `devices`. Raises ValueError where none fits."""
        sizes = self.sizes
        known = 1
        for size in sizes.values():
            known *= max(size, 1)
        written = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1) or "all axes 1"
        if -1 not in sizes.values():
            if known != devices:
                raise ValueError(f"mesh: {written} is {known} devices, not {devices}; change an axis or mesh.devices")
            return sizes
        if devices % known:
            raise ValueError(f"mesh: {written} does not divide {devices} devices; the other axes take {known}")
        return {axis: devices // known if size == -1 else size for axis, size in sizes.items()}

    @property
    def device_product(self) -> int | None:
        """Devices the axes make; None where one is -1."""
        return None if -1 in self.sizes.values() else math.prod(self.sizes.values())


class MeshConfig(AxesConfig):
    """The mesh: its axes, on which devices."""

    platform: Literal["auto", "cpu", "gpu"] = "auto"
    """cpu simulates `devices` devices in this process; auto: gpu where there is one."""
    devices: int | None = None
    """Devices to use, over all processes; null: the product of the axes, or every device where an axis is -1."""
    zero: Literal[1, 3] = 3
    """What `fsdp` shards: 3 parameters, gradients and optimizer state; 1 optimizer state only (arXiv:1910.02054)."""

    @model_validator(mode="after")
    def _fits_devices(self) -> "MeshConfig":
        if self.devices is not None:
            self.resolve_sizes(self.devices)
        return self

    @property
    def device_count(self) -> int | None:
        """Devices the mesh wants, where the configuration alone tells: `devices` or the product of the axes."""
        return self.device_product if self.devices is None else self.devices


class PipelineConfig(Section):
    """How `mesh.pipe` devices share the layers and the microbatches; without effect where it is 1."""

    schedule: str = "1f1b"
    """Name of a schedule (`meshwright schedule` lists them), or a table in a .csv file."""
    chunks: int | None = Field(None, ge=1)
    """Pieces of the model a device holds; null: what the schedule wants."""
    vocab_parallel: Literal[0, 1, 2] = 0
    """0: embedding on the first stage, head on the last; 1, 2: both shared by all, by Algorithm 1 or 2
    (arXiv:2411.05288)."""
    layers: list[int] | Literal["even", "balanced"] = "even"
    """Layers of each stage, or how they are dealt out: balanced leaves fewer to the stage that has the head."""
    backward: Literal["split", "fused"] = "split"
    """split: input and weight gradients are passes of their own; fused: one pass, twice as long, nothing stashed."""
    post_validation: bool = False
    """Update before the global gradient norm is known, validate by it, and do it again where it was to be clipped or
    skipped (arXiv:2401.10241); keeps the old state until then."""
    measure: bool = True
    """After the last step, time each op on its own for the report; compiles the engine twice more."""
    memory_limit: float | None = Field(None, gt=0)
    """Microbatches' activations a device may hold at once (schedule auto)."""


class SequenceConfig(Section):
    """How attention sees the whole sequence when `mesh.seq` splits it."""

    parallel: Literal["all-gather", "ring", "ulysses"] = "all-gather"
    """all-gather: keys and values are gathered; ring: they rotate; ulysses: heads are exchanged for tokens."""


class MemoryConfig(Section):
    """What the backward pass finds again, recomputes, or fetches from the host."""

    policy: Literal["none", "full", "attention-out", "minimal", "offload-block-in"] = "none"
    """none keeps everything; full recomputes each block; the rest are named in `memory/policy.py`."""
    names: dict[str, MemoryDecision] = {}
    """Tensor name -> keep | recompute | offload, on top of `policy`; a name no block emits is an error."""
    loss_chunks: int = 1
    """The head and its loss run over this many slices of the sequence, so that logits exist for one slice at a time."""

    @property
    def offloads(self) -> bool:
        """Whether anything is fetched from the host."""
        preset: dict[str, MemoryDecision] = {"block_in": "offload"} if self.policy == "offload-block-in" else {}
        return "offload" in (preset | self.names).values()


class PrecisionConfig(Section):
    """Number formats."""

    parameters: DTYPE = "float32"
    """Stored weights; the optimizer's state is float32 always."""
    compute: DTYPE = "float32"
    """Matrix products and activations; softmax, norms and losses are float32 always."""
    gradients: DTYPE = "float32"
    """Sums of gradients over microbatches and devices."""
