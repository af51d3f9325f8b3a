"""`meshwright bench pipeline`: the pipeline engine beside the same model without one, and beside its own simulator.

All on simulated CPU devices; each part is a process of its own, whose cases take turns:

    step     a pipelined step over plain FSDP with as many microbatches, on 8 devices (target: at most 1.25)
    order    pipe 2 on 2 cores: measured seconds of each schedule beside the simulator's, from measured ops. Two
             processes, a core each: in one process, ops of a device spread over the cores that idle devices leave
    memory   compiled temporaries of a device at 8 and at 64 microbatches (target: under 3 % apart), and those of each
             schedule over 8 devices beside what the simulator makes of one activation's bytes (target: within 15 %)
    compile  seconds to compile the step, over the plain step's, and at 8 and 64 microbatches
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from meshwright.configs.loader import merge_trees, validate_tree
from meshwright.configs.run import RunConfig

MODEL = {"vocab": 2048, "layers": 8, "embed": 256, "heads": 8, "mlp": 768}
BASE = {
    "steps": 1000,
    "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
    "data": {"source": "synthetic", "tokenizer": {"bytes": True}, "sequence_length": 128, "global_batch": 16},
    "microbatches": 8,
}
Clock = Callable[[], float]
PARTS = ("step", "order", "memory", "compile")
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
    """The run that is timed, over `mesh`."""
    base = merge_trees(BASE, {"model": MODEL, "mesh": mesh | {"platform": "cpu"}})
    return validate_tree(merge_trees(base, changes))


class Case:
    """A compiled step with a state and a batch."""

    def __init__(self, config: RunConfig):
        import jax
        import numpy as np

        from meshwright.parallel.mesh import make_mesh
        from meshwright.train.engine.host_data import make_global_arrays
        from meshwright.train.engine.program import build

        mesh = make_mesh(config.mesh)
        self.program = build(config, mesh)
        began = time.perf_counter()
        self.step = self.program.compiled_step()
        self.compile_seconds = time.perf_counter() - began
        self.temporaries = self.step.memory_analysis().temp_size_in_bytes
        shape = (config.data.global_batch, config.data.sequence_length)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab, shape, dtype=np.int32)
        fields = {
            "tokens": tokens,
            "targets": np.roll(tokens, -1, axis=1),
            "loss_weights": np.ones(shape, np.float32),
            "segment_ids": np.ones(shape, np.int32),
            "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        }
        self.batch = make_global_arrays(fields, config, mesh)
        self.state = self.program.initialize()
        self.ready: Callable[[Any], Any] = jax.block_until_ready

    def seconds(self, clock: Clock = time.perf_counter) -> float:
        """Of one more step, by `clock`."""
        began = clock()
        self.state, metrics = self.step(self.state, self.batch)
        self.ready((self.state, metrics))
        return clock() - began


def time_in_turns(cases: dict[str, Case], *, rounds: int, clock: Clock = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of every case, taken in turns; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            seconds = case.seconds(clock)
            if number:
                found[name].append(seconds)
    return found


def step(rounds: int) -> dict[str, Any]:
    """Pipelined steps over the plain one, as medians of ratios of neighbours in time.

    On the wall's clock, and in the seconds that all cores worked: on a machine with other work only these compare.
    """
    plain = {"plain": Case(configuration({"fsdp": 8}, microbatches=2))}
    staged = {name: Case(configuration({"pipe": 4, "fsdp": 2}, pipeline=of)) for name, of in SCHEDULES.items()}
    result: dict[str, Any] = {}
    for name, clock in (("", time.perf_counter), ("cpu ", time.process_time)):
        found = time_in_turns(plain | staged, rounds=rounds, clock=clock)
        ratios = {case: [a / b for a, b in zip(found[case], found["plain"], strict=True)] for case in staged}
        result |= {
            f"{name}plain_seconds": statistics.median(found["plain"]),
            f"{name}over_plain": {case: round(statistics.median(values), 3) for case, values in ratios.items()},
        }
    return result


def order(rounds: int) -> dict[str, Any]:
    """Two devices, each a process on its own core: seconds of a step, and what the simulator makes of measured ops.

    All schedules are priced alike: an op is the median of what it took in those that have it.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("bench pipeline order: needs 2 cores")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [sys.executable, "-m", "meshwright.benchmarks.pipeline_order", address, str(rounds)]
    jobs = [subprocess.Popen([*words, str(number), str(core)], stdout=subprocess.PIPE, text=True)
            for number, core in enumerate(cores)]  # fmt: skip
    told, _ = (job.communicate()[0] for job in jobs)
    if any(job.returncode for job in jobs):
        raise SystemExit("bench pipeline order: a process failed; see above")
    return compared(json.loads(told.splitlines()[-1]))  # Gloo tells of its connections before


def compared(told: dict[str, Any]) -> dict[str, Any]:
    """Measured and simulated seconds by schedule, from what `pipeline_order` tells, and which pairs agree."""
    from meshwright.parallel.pipeline.tables.costs import Costs
    from meshwright.parallel.pipeline.tables.simulator import simulate
    from meshwright.train.engine.pipeline.pipeline_plan import make_pipeline_plan

    prices = common(told["costs"])
    rows = {}
    for name, of in SCHEDULES.items():
        stages = make_pipeline_plan(configuration({"pipe": 2}, pipeline=of), pipe=2)
        own = {op: prices[op] for op, price in told["costs"][name].items() if price is not None and op in prices}
        if of.get("backward") == "fused":
            own |= {"input_gradient": told["costs"][name]["input_gradient"], "weight_gradient": 0.0}
        costs = Costs(**own, stages=tuple(one / stages.max_repeats for one in stages.repeats))
        rows[name] = {"measured": told["seconds"][name], "simulated": simulate(stages.table, costs).lockstep,
                      "ticks": stages.table.ticks}  # fmt: skip
    names = list(rows)
    agree = [(rows[a]["measured"] - rows[b]["measured"]) * (rows[a]["simulated"] - rows[b]["simulated"]) > 0
             for i, a in enumerate(names) for b in names[:i]]  # fmt: skip
    return {"ops": prices, "schedules": rows, "pairs_in_the_same_order": f"{sum(agree)} of {len(agree)}"}


def common(costs: dict[str, dict[str, float | None]]) -> dict[str, float]:
    """Seconds of each op: the median over the schedules that have it."""
    split = [one for name, one in costs.items() if SCHEDULES[name].get("backward") != "fused"]
    return {
        op: statistics.median(seen)
        for op, price in split[0].items()
        if isinstance(price, float | None) and (seen := [one[op] for one in split if one[op]])
    }


def memory(rounds: int) -> dict[str, Any]:
    """Temporaries of a device with 8 and 64 microbatches; of each schedule, compiled and predicted.

    Predicted: the simulator's pools, of the bytes that a traced block saves, and all else as GPipe has it.
    """
    del rounds
    from meshwright.parallel.pipeline.tables.simulator import pool_bytes, stash_bytes

    def case(name: str, count: int, **pipeline: Any) -> Case:
        long = {"sequence_length": 1024, "global_batch": count}
        small = {"embed": 64, "heads": 2, "mlp": 192, "layers": 16, "vocab": 512}
        of = {"schedule": name} | pipeline
        return Case(configuration({"pipe": 8}, model=small, microbatches=count, data=long, pipeline=of))

    few, many = (case("1f1b", count).temporaries for count in (8, 64))
    gpipe = case("gpipe", 8)
    rest = gpipe.temporaries - pool_bytes(gpipe.program.pipeline_plan.table, **saved_bytes(gpipe))
    rows = {}
    for name in ("1f1b", "zb-h1", "zb-v", "v-half", "v-min"):
        one = case(name, 16)
        table, saved = one.program.pipeline_plan.table, saved_bytes(one)
        predicted = rest + pool_bytes(table, **saved)
        rows[name] = {"most at once": round(float(stash_bytes(table, **saved).max())), "compiled": one.temporaries,
                      "predicted": round(predicted), "ratio": round(one.temporaries / predicted, 3)}  # fmt: skip
    return {"1f1b at 8": few, "1f1b at 64": many, "growth": round(many / few - 1, 4), "not pools": round(rest),
            "schedules, 16 microbatches": rows}  # fmt: skip


def saved_bytes(case: Case) -> dict[str, float]:
    """Bytes that a stage saves of a microbatch, by pool, where only `pipe` cuts the run."""
    import jax

    from meshwright.parallel.pipeline.executor.table_executor import split_block
    from meshwright.train.engine import forward_backward
    from meshwright.train.engine.pipeline import stages as pipeline

    program, config = case.program, case.program.config
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
    each = {
        name: sum(leaf.size * leaf.dtype.itemsize for leaf in shapes) for name, shapes in block.shapes._asdict().items()
    }
    return {name: float(size * program.pipeline_plan.max_repeats) for name, size in each.items()}


def compile(rounds: int) -> dict[str, Any]:
    """Seconds to compile, plain and pipelined, with few and many microbatches."""
    del rounds
    plain = Case(configuration({"fsdp": 4}, microbatches=2)).compile_seconds
    few, many = (
        Case(configuration({"pipe": 4}, microbatches=count, data={"global_batch": count})).compile_seconds
        for count in (8, 64)
    )
    return {
        "plain": round(plain, 2),
        "at_8": round(few, 2),
        "at_64": round(many, 2),
        "over_plain": round(few / plain, 2),
    }


def main(arguments: Sequence[str]) -> None:
    """Run the parts that are named, all by default, and print JSON."""
    parser = argparse.ArgumentParser(prog="meshwright bench pipeline", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(arguments)
    parts = options.parts or PARTS
    if len(parts) > 1:
        for part in parts:
            words = ["bench", "pipeline", part, "--rounds", str(options.rounds)]
            subprocess.run([sys.executable, "-m", "meshwright.train.cli", *words], check=True)
        return
    (part,) = parts
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
    print(json.dumps({part: globals()[part](options.rounds)}, indent=1), flush=True)
