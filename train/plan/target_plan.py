"""`meshwright plan CONFIG --target v5p:4x4x4,v6e:16x16`: compile the step for devices that are not here, and price it.

    plans = [plan_target("pretrain/llama-1b", [], parse_topology("v5p:2x2x2"))]

Memory is the compiler's; the seconds of a step are its estimates (`step_estimate.py`), which serve for ratios.
"""

import re
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...configs.errors import UserError
from ...configs.hardware_targets import Topology
from ...configs.run import RunConfig
from ...configs.target_fit import config_for_target, target_warnings
from ...parallel.compile_target import prepare_to_compile, target_devices
from ...parallel.compiler_options import compiler_options
from ...parallel.mesh import make_mesh
from ..engine.program import build
from .compile_plan import make_plan, training_flops
from .step_estimate import StepEstimate, estimate_step

NEEDED = re.compile(r"(?:Used |total memory required for HLO temporaries \()(\d+(?:\.\d+)?)([KMGT]?)")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
LINES = 12  # source lines in a plan
# Changes that save memory, those that cost least time first.
SAVINGS = (
    ("memory.loss_chunks={}", lambda config: max(8, 2 * config.memory.loss_chunks)),
    ("microbatches={}", lambda config: 2 * config.microbatches),
    ("memory.policy={}", lambda config: None if config.memory.policy in ("minimal", "full") else "minimal"),
    ("memory.policy={}", lambda config: None if config.memory.policy == "full" else "full"),
    ("memory.policy=full microbatches={}", lambda config: 4 * config.microbatches),
    ("precision.parameters={}", lambda config: None if config.precision.parameters == "bfloat16" else "bfloat16"),
)
ENOUGH = 3  # changes that make a run fit


@dataclass(frozen=True)
class TargetPlan:
    """A run on one target."""

    target: str
    devices: int
    mesh: dict[str, int]
    device_memory_bytes: int | None  # what a program may use
    peak_bytes: int | None  # of a device; None if the compiler does not say how much it would be
    compile_seconds: float
    compiler_options: dict[str, Any]
    warnings: list[str]
    savings: dict[str, int]  # overrides that would make it fit -> peak_bytes
    plan: dict[str, Any] | None = None  # `compile_plan.make_plan`; None if it does not fit
    step: dict[str, Any] | None = None  # the estimate

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        if self.plan is None or self.peak_bytes is None:
            return False
        return self.device_memory_bytes is None or self.peak_bytes <= self.device_memory_bytes

    def to_json(self) -> dict[str, Any]:
        """The plan as values for JSON."""
        return asdict(self) | {"fits": self.fits}


def plan_target(config: str, overrides: list[str], topology: Topology, *, find_savings: bool = True) -> TargetPlan:
    """Compile the step of `config` for `topology`. Raises UserError where the run is none for these devices.

    If a device has too little memory, changes are tried until three make the run fit, unless `find_savings` is False.
    """
    loaded = config_for_target(config, overrides, topology)
    prepare_to_compile()
    mesh = make_mesh(loaded.mesh, devices=target_devices(topology))
    program = build(loaded, mesh)
    began = time.perf_counter()
    plan = step = None
    try:
        compiled = program.compiled_step()
    except Exception as error:
        peak = needed_bytes(error)
        if peak is None and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = time.perf_counter() - began
    else:
        seconds = time.perf_counter() - began
        plan = make_plan(program, compiled)
        peak = plan["compiled"]["peak_bytes"]
        step = describe_step(
            estimate_step(compiled.as_text(), mesh=mesh, topology=topology, causal=not any(loaded.model.windows)),
            loaded,
            topology,
        )
    result = TargetPlan(
        target=str(topology),
        devices=topology.devices,
        mesh={axis: size for axis, size in mesh.shape.items() if size > 1},
        device_memory_bytes=topology.target.memory_bytes,
        peak_bytes=peak,
        compile_seconds=seconds,
        compiler_options=compiler_options(loaded.mesh, mesh),
        warnings=target_warnings(loaded, topology),
        savings={},
        plan=plan,
        step=step,
    )
    if result.fits or not find_savings:
        return result
    return replace(result, savings=fitting_changes(config, overrides, topology, loaded))


def needed_bytes(error: Exception) -> int | None:
    """The bytes that libtpu says a program needs, in the error by which it refuses it; None for another error."""
    found = NEEDED.search(str(error))
    return None if found is None else int(float(found[1]) * UNITS[found[2]])


def fitting_changes(config: str, overrides: list[str], topology: Topology, loaded: RunConfig) -> dict[str, int]:
    """Overrides that make the run fit `topology` -> peak bytes of a device: the first three that do."""
    found: dict[str, int] = {}
    for form, choose in SAVINGS:
        value = choose(loaded)
        if value is None or len(found) == ENOUGH:
            continue
        change = form.format(value)
        try:
            tried = plan_target(config, [*overrides, *change.split()], topology, find_savings=False)
        except UserError:  # not for this run
            continue
        if tried.fits:
            found[change] = tried.peak_bytes
    return found


def describe_step(estimate: StepEstimate, config: RunConfig, topology: Topology) -> dict[str, Any]:
    """The estimate of a step as values for JSON, with what follows from its seconds."""
    tokens = config.data.global_batch * config.data.sequence_length
    peak = topology.target.peak_flops.get("bfloat16")
    exposed = sum(cost.exposed_seconds for cost in estimate.collectives)
    return {
        "seconds": estimate.seconds,
        "tokens_per_second": tokens / estimate.seconds,
        "mfu": None if peak is None else training_flops(config) * tokens / estimate.seconds / peak / topology.devices,
        "seconds_by_part": estimate.by_part(),
        "seconds_by_source": dict(estimate.by_source()[:LINES]),
        "seconds_by_basis": estimate.by_basis(),
        "collectives": {
            "exposed_seconds": exposed,
            "hidden_seconds": sum(cost.link_seconds for cost in estimate.collectives) - exposed,
            "synchronous": synchronous_collectives(estimate),
        },
        "unknown": dict(estimate.unknown),
    }


def synchronous_collectives(estimate: StepEstimate) -> list[dict[str, Any]]:
    """Collectives that nothing else runs beside, by kind, axes and source, the longest first."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for cost in estimate.collectives:
        if cost.synchronous:
            key = (cost.kind, "+".join(cost.axes), cost.source)
            row = rows.setdefault(
                key, dict(zip(("kind", "axes", "source"), key, strict=True)) | {"runs": 0, "bytes": 0, "seconds": 0.0}
            )
            row["runs"] += cost.runs
            row["bytes"] += cost.bytes
            row["seconds"] += cost.exposed_seconds
    return sorted(rows.values(), key=lambda row: -row["seconds"])
