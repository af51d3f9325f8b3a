"""One of the two processes of `meshwright bench pipeline order`: a device of the pipeline on a core of its own.

    python -m meshwright.benchmarks.pipeline_order ADDRESS ROUNDS NUMBER CORE

The first one prints JSON: median seconds of a step by schedule, and the seconds of its ops.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence

from .pipeline import SCHEDULES, configuration, time_steps
from .step import TimedStep


def main(arguments: Sequence[str]) -> None:
    """Join the other process, and time all schedules in turns, then their ops."""
    address, rounds, number, core = arguments
    os.sched_setaffinity(0, {int(core)})  # before JAX makes its threads
    os.environ["XLA_FLAGS"] = ""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(number))
    from meshwright.train.engine.op_profiler import measure_costs

    steps = {name: TimedStep(configuration({"pipe": 2}, pipeline=of)) for name, of in SCHEDULES.items()}
    seconds = {name: statistics.median(values) for name, values in time_steps(steps, rounds=int(rounds)).items()}
    costs = {
        name: measure_costs(step.program, step.state.params, step.state.frozen, step.batch).model_dump(mode="json")
        for name, step in steps.items()
    }
    if number == "0":
        print(json.dumps({"seconds": seconds, "costs": costs}))


if __name__ == "__main__":
    main(sys.argv[1:])
