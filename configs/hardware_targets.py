"""Hardware targets: what a run can be priced, compiled and launched for. `hardware/*.yaml`, one file a kind of device.

    topology = parse_topology("v5p:4x4x4")          # 64 devices; also h100x8, and 2*v5p:2x2x2 for two slices
    find_target("TPU v5")                           # by `device_kind` of JAX; None for a device without a file

All numbers are of one device as JAX counts them, in bytes, FLOP/s, bytes/s and Hz; rates of links are one way. Each has
its source in the file.
"""

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, model_validator

from .errors import UserError
from .sections.base import Section

DIRECTORY = Path(__file__).parent / "hardware"
WRITTEN = re.compile(r"(?:(?P<slices>\d+)\*)?(?P<name>[a-z0-9-]+?)(?::(?P<shape>\d+(?:x\d+)*)|x(?P<count>\d+))?")


class Links(Section):
    """The links between the devices of a slice, or of a host."""

    topology: Literal["torus", "switch", "pcie"]
    bandwidth: float = Field(gt=0)
    """Of one link of a torus, of all links of a device otherwise."""
    axes: int | None = Field(None, ge=1)
    """Dimensions of a torus; a device has two links along each."""
    wraps_from: int | None = Field(None, ge=1)
    """The size of an axis of a torus from which its ends are linked, where it is a multiple."""

    chip_bandwidth: float | None = None
    """Between the devices of one chip, where it has several."""

    @model_validator(mode="after")
    def _torus_has_axes(self) -> "Links":
        if (self.topology == "torus") != (self.axes is not None and self.wraps_from is not None):
            raise ValueError(f"links: {self.topology}, and axes, wraps_from belong to a torus, which needs both")
        return self


class CompilerOption(Section):
    """An option of a compilation, with why it is set."""

    value: str | int | float | bool
    reason: str
    measured: str
    """What was seen with it and without it, and the command."""


class KernelCycles(Section):
    """Cycles of a Pallas kernel of attention over a grid of [block x block] scores, for one head of one row."""

    step: float
    """Of each step of the grid, computed or skipped."""
    tile: float
    """Of each block of scores that is computed, beyond `step`."""
    line: float
    """Of each line of blocks, beyond `step` and `tile`."""
    cores: int = 1
    """Cores that share the heads."""


class Resources(Section):
    """What launchers call a device; null where they know none."""

    kubernetes: str | None = None
    kubernetes_accelerator: str | None = None
    """Value of the node label cloud.google.com/gke-tpu-accelerator."""
    kubernetes_chips: int | None = None
    """Chips of a node of a slice that has several nodes."""
    slurm: str | None = None
    """Name of the generic resource."""
    ray: str | None = None


class HardwareTarget(Section):
    """One kind of device."""

    name: str
    platform: Literal["tpu", "gpu", "cpu"]
    kinds: tuple[str, ...]
    """Values of `device_kind` in JAX, whole."""
    compiler: Literal["libtpu", "xla-gpu", "xla-cpu"] | None
    """What compiles for it on a machine without one; null: only its numbers are known."""
    topology_name: str | None = None
    """The compiler's name of it, before the shape."""
    topology_options: dict[str, str] = {}
    devices_per_chip: int = 1
    devices_per_host: int
    memory_bytes: int | None
    memory_bandwidth: float | None
    peak_flops: dict[str, float]
    """FLOP/s of dense products by dtype."""
    clock_hz: float | None = None
    """What the cycles in the compiler's estimates are counted in."""
    links: Links | None
    host_bandwidth: float | None
    """Between a device and its host's memory."""
    network_bandwidth: float | None
    """Of a device's share of the network between slices."""
    compiler_options: dict[str, CompilerOption] = {}
    kernels: dict[str, dict[int, KernelCycles]] = {}
    """Kernel -> head_dim -> its cycles, with the largest blocks."""
    resources: Resources
    sources: dict[str, str]

    @property
    def is_torus(self) -> bool:
        """Whether a slice has a shape."""
        return self.links is not None and self.links.topology == "torus"

    @property
    def option_values(self) -> dict[str, str | int | float | bool]:
        """Compiler option -> value."""
        return {name: option.value for name, option in self.compiler_options.items()}


@dataclass(frozen=True)
class Topology:
    """Devices of one target and how they are linked."""

    target: HardwareTarget
    shape: tuple[int, ...]  # chips along each axis of a torus; else (hosts, devices of a host)
    slices: int = 1  # linked by the network only

    @property
    def devices(self) -> int:
        """Devices of all slices."""
        return math.prod(self.shape) * self.target.devices_per_chip * self.slices

    def __str__(self) -> str:
        """The text that `parse_topology` reads."""
        slices = f"{self.slices}*" if self.slices > 1 else ""
        if self.target.is_torus:
            return f"{slices}{self.target.name}:{'x'.join(map(str, self.shape))}"
        return f"{slices}{self.target.name}x{math.prod(self.shape)}"


@cache
def hardware_targets() -> dict[str, HardwareTarget]:
    """Name -> target, for each file in `hardware/`."""
    files = sorted(DIRECTORY.glob("*.yaml"))
    return {
        file.stem: HardwareTarget.model_validate({"name": file.stem, **yaml.safe_load(file.read_text("utf-8"))})
        for file in files
    }


def find_target(device_kind: str) -> HardwareTarget | None:
    """The target whose devices JAX calls `device_kind`; None where no file has it."""
    return next((target for target in hardware_targets().values() if device_kind in target.kinds), None)


def parse_topology(text: str, *, key: str = "--target") -> Topology:
    """Read `v5p:4x4x4`, `h100x8`, `h200` (one device), `2*v5p:2x2x2` (two slices). Raises UserError, naming `key`."""
    match = WRITTEN.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{key}: {text} is not a target; write v5p:4x4x4, h100x8 or 2*v6e:4x4")
    targets = hardware_targets()
    if match["name"] not in targets:
        raise UserError.no_match(key, [match["name"]], candidates=targets)
    target, slices = targets[match["name"]], int(match["slices"] or 1)
    if target.is_torus:
        return Topology(target, _torus_shape(text, target, match["shape"], match["count"], key), slices)
    if match["shape"] is not None:
        raise UserError(f"{key}: {text} has a shape, and {target.name} has none; write {target.name}x8")
    return Topology(target, _hosts(text, target, int(match["count"] or 1), key), slices)


def _torus_shape(text: str, target: HardwareTarget, shape: str | None, count: str | None, key: str) -> tuple[int, ...]:
    example = "x".join(["4"] * target.links.axes)
    if shape is None:
        problem = f"counts {count} devices" if count else "has no shape"
        raise UserError(f"{key}: {text} {problem}; a {target.name} slice has one, e.g. {target.name}:{example}")
    sizes = tuple(int(size) for size in shape.split("x"))
    if len(sizes) != target.links.axes or 0 in sizes:
        raise UserError(
            f"{key}: {text} has {len(sizes)} axes, but the torus of {target.name} has {target.links.axes}; "
            f"write e.g. {target.name}:{example}"
        )
    return sizes


def _hosts(text: str, target: HardwareTarget, count: int, key: str) -> tuple[int, ...]:
    per_host = target.devices_per_host
    if count < 1 or (count > per_host and count % per_host):
        raise UserError(
            f"{key}: {text} has {count} devices, but a host has {per_host}; use at most {per_host}, or a multiple"
        )
    return (max(1, count // per_host), min(count, per_host))
