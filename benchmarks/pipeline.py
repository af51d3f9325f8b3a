"""`meshwright bench pipeline`: pipelines next to the same model without one, and next to their simulator.

All parts use simulated CPU devices; each is a process of its own, in which measurements take turns:

    step     a pipelined step over plain FSDP with as many microbatches, on 8 devices (target: at most 1.25)
    order    pipe 2 on 2 cores: measured seconds of each schedule next to the simulator's, from measured ops. Each
             device is a process on a core, because in one process its ops would use the cores of idle devices
    memory   compiled temporaries of a device at 8 and at 64 microbatches (target: under 3 % apart), and those of each
             schedule over 8 devices next to the simulator's prediction (target: within 15 %)
    compile  seconds to compile the step, over those of the plain step, and at 8 and 64 microbatches
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from meshwright.benchmarks.harness import bench_parser, median_ratio, run_in_turns
from meshwright.benchmarks.step import TimedStep
from meshwright.configs.loader import merge_trees, validate_tree
from meshwright.configs.run import RunConfig
from meshwright.train.launch.local_processes import free_port

if TYPE_CHECKING:
    from meshwright.train.engine.program import Program

MODEL = {"vocab": 2048, "layers": 8, "embed": 256, "heads": 8, "mlp": 768}
BASE = {
    "steps": 1000,
    "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
    "data": {"source": "synthetic", "tokenizer": {"bytes": True}, "sequence_length": 128, "global_batch": 16},
    "microbatches": 8,
}
Clock = Callable[[], float]
FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600"
SCHEDULES: dict[str, dict[str, Any]] = {
    "1f1b": {"schedule": "1f1b"},
    "1f1b, fused": {"schedule": "1f1b", "backward": "fused"},
    "1f1b, shared vocabulary": {"schedule": "1f1b", "vocab_parallel": 2},
    "zb-h1": {"schedule": "zb-h1"},
    "zb-v": {"schedule": "zb-v"},
    "v-half": {"schedule": "v-half"},
}


def configuration(mesh: dict[str, int], **changes: Any) -> RunConfig:
    """The configuration of the measured run on `mesh`."""
    base = merge_trees(BASE, {"model": MODEL, "mesh": mesh | {"platform": "cpu"}})
    return validate_tree(merge_trees(base, changes))


def time_steps(steps: dict[str, TimedStep], *, rounds: int, clock: Clock = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of every step, in turns, by `clock`."""
    return run_in_turns({name: partial(step.run, clock) for name, step in steps.items()}, rounds=rounds)


def measure_step(rounds: int) -> dict[str, Any]:
    """The median ratio of pipelined steps to the plain one.

    In seconds of the wall clock, and in seconds of all cores, which are comparable on a machine with other load.
    """
    steps = {"plain": TimedStep(configuration({"fsdp": 8}, microbatches=2))}
    for name, pipeline in SCHEDULES.items():
        steps[name] = TimedStep(configuration({"pipe": 4, "fsdp": 2}, pipeline=pipeline))
    result: dict[str, Any] = {}
    for prefix, clock in (("", time.perf_counter), ("cpu ", time.process_time)):
        seconds = time_steps(steps, rounds=rounds, clock=clock)
        plain = seconds.pop("plain")
        ratios = {name: round(median_ratio(values, plain), 3) for name, values in seconds.items()}
        result |= {f"{prefix}plain_seconds": statistics.median(plain), f"{prefix}over_plain": ratios}
    return result


def measure_order(rounds: int) -> dict[str, Any]:
    """Measure steps of two devices, each a process on its own core, and compare with the simulator."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit(f"bench pipeline order: {len(cores)} core is available; it needs 2")
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "meshwright.benchmarks.pipeline_order", address, str(rounds)]
    jobs = [subprocess.Popen([*command, str(number), str(core)], stdout=subprocess.PIPE, text=True)
            for number, core in enumerate(cores)]  # fmt: skip
    output, _ = (job.communicate()[0] for job in jobs)
    if any(job.returncode for job in jobs):
        raise SystemExit("bench pipeline order: a process failed; see above")
    return compare_with_simulator(json.loads(output.splitlines()[-1]))  # lines of Gloo precede


def compare_with_simulator(measured: dict[str, Any]) -> dict[str, Any]:
    """Measured and simulated seconds by schedule, from the output of `pipeline_order`, and how many pairs agree."""
    from meshwright.parallel.pipeline.tables.costs import Costs
    from meshwright.parallel.pipeline.tables.simulator import simulate
    from meshwright.train.engine.pipeline.pipeline_plan import make_pipeline_plan

    medians = median_costs(measured["costs"])
    rows = {}
    for name, pipeline in SCHEDULES.items():
        plan = make_pipeline_plan(configuration({"pipe": 2}, pipeline=pipeline), pipe=2)
        ops = measured["costs"][name]
        seconds = {op: medians[op] for op, cost in ops.items() if cost is not None and op in medians}
        if pipeline.get("backward") == "fused":
            seconds |= {"input_gradient": ops["input_gradient"], "weight_gradient": 0.0}
        costs = Costs(**seconds, stages=tuple(count / plan.max_repeats for count in plan.repeats))
        rows[name] = {"measured": measured["seconds"][name], "simulated": simulate(plan.table, costs).lockstep,
                      "ticks": plan.table.ticks}  # fmt: skip
    names = list(rows)
    agree = [(rows[a]["measured"] - rows[b]["measured"]) * (rows[a]["simulated"] - rows[b]["simulated"]) > 0
             for i, a in enumerate(names) for b in names[:i]]  # fmt: skip
    return {"ops": medians, "schedules": rows, "pairs_in_the_same_order": f"{sum(agree)} of {len(agree)}"}


def median_costs(costs: dict[str, dict[str, float | None]]) -> dict[str, float]:
    """Seconds of each op: the median over the schedules that have it, so that all schedules have the same costs."""
    split = [ops for name, ops in costs.items() if SCHEDULES[name].get("backward") != "fused"]
    return {
        op: statistics.median(values)
        for op, cost in split[0].items()
        if isinstance(cost, float | None) and (values := [ops[op] for ops in split if ops[op]])
    }


def measure_memory(rounds: int) -> dict[str, Any]:
    """Temporaries of a device with 8 and 64 microbatches; of each schedule, compiled and predicted.

    The prediction is the simulator's pools, with the bytes that a traced block saves, and all else as in GPipe.
    """
    del rounds
    from meshwright.parallel.pipeline.tables.simulator import pool_bytes, stash_bytes

    def compile_step(schedule: str, count: int) -> "tuple[int, Program]":
        data = {"sequence_length": 1024, "global_batch": count}
        model = {"embed": 64, "heads": 2, "mlp": 192, "layers": 16, "vocab": 512}
        pipeline = {"schedule": schedule}
        step = TimedStep(configuration({"pipe": 8}, model=model, microbatches=count, data=data, pipeline=pipeline))
        return step.memory["temporary_bytes"], step.program

    few, many = (compile_step("1f1b", count)[0] for count in (8, 64))
    temporaries, gpipe = compile_step("gpipe", 8)
    rest = temporaries - pool_bytes(gpipe.pipeline_plan.table, **saved_bytes(gpipe))
    rows = {}
    for name in ("1f1b", "zb-h1", "zb-v", "v-half", "v-min"):
        temporaries, program = compile_step(name, 16)
        table, saved = program.pipeline_plan.table, saved_bytes(program)
        predicted = rest + pool_bytes(table, **saved)
        rows[name] = {"most at once": round(float(stash_bytes(table, **saved).max())), "compiled": temporaries,
                      "predicted": round(predicted), "ratio": round(temporaries / predicted, 3)}  # fmt: skip
    return {"1f1b at 8": few, "1f1b at 64": many, "growth": round(many / few - 1, 4), "not pools": round(rest),
            "schedules, 16 microbatches": rows}  # fmt: skip


def saved_bytes(program: "Program") -> dict[str, float]:
    """Bytes that a stage saves of a microbatch, by pool, in a run sharded over `pipe` only."""
    import jax

    from meshwright.parallel.pipeline.executor.table_executor import split_block
    from meshwright.train.engine import forward_backward
    from meshwright.train.engine.pipeline import stages as pipeline

    config = program.config
    rows = config.data.global_batch // config.microbatches
    fields = {
        name: jax.ShapeDtypeStruct((config.microbatches, rows, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in program.batch_shapes.items()
    }
    with jax.set_mesh(program.mesh):
        parts = forward_backward.make_stage_functions(config, program.mesh, program.graph)
        block, _ = split_block(
            parts, *map(pipeline.split_stacked, (program.shapes.params, program.shapes.frozen)), fields, None
        )
    sizes = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in shapes) for name, shapes in block.shapes._asdict().items()
    }
    return {name: float(size * program.pipeline_plan.max_repeats) for name, size in sizes.items()}


def measure_compile(rounds: int) -> dict[str, Any]:
    """Seconds to compile, plain and pipelined, with few and many microbatches."""
    del rounds
    plain = TimedStep(configuration({"fsdp": 4}, microbatches=2)).compile_seconds
    configs = [configuration({"pipe": 4}, microbatches=count, data={"global_batch": count}) for count in (8, 64)]
    few, many = (TimedStep(config).compile_seconds for config in configs)
    seconds = {"plain": plain, "at_8": few, "at_64": many, "over_plain": few / plain}
    return {name: round(value, 2) for name, value in seconds.items()}


PARTS = {"step": measure_step, "order": measure_order, "memory": measure_memory, "compile": measure_compile}


def main(arguments: Sequence[str]) -> None:
    """Measure the named parts, all by default, and print JSON."""
    parser = bench_parser("pipeline", __doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(arguments)
    parts = options.parts or list(PARTS)
    if len(parts) > 1:
        for part in parts:
            command = ["bench", "pipeline", part, "--rounds", str(options.rounds)]
            subprocess.run([sys.executable, "-m", "meshwright.train.cli", *command], check=True)
        return
    (part,) = parts
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    print(json.dumps({part: PARTS[part](options.rounds)}, indent=1), flush=True)
