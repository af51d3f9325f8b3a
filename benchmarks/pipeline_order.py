"""One of the two processes of `meshwright bench pipeline order`: a pipeline's device on a core of its own.

    python -m meshwright.benchmarks.pipeline_order ADDRESS ROUNDS NUMBER CORE

The first one prints JSON: median seconds of a step by schedule, and what each of its ops took.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence

from .pipeline import SCHEDULES, Case, configuration, time_in_turns


def main(arguments: Sequence[str]) -> None:
    """Join the other process, time all schedules in turns, then their ops."""
    address, rounds, number, core = arguments
    os.sched_setaffinity(0, {int(core)})  # before JAX makes its threads
    os.environ["XLA_FLAGS"] = ""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, int(number))
    from meshwright.train.engine.op_profiler import measure_costs

    cases = {name: Case(configuration({"pipe": 2}, pipeline=of)) for name, of in SCHEDULES.items()}
    seconds = time_in_turns(cases, rounds=int(rounds))
    costs = {
        name: measure_costs(case.program, case.state.params, case.state.frozen, case.batch)
        for name, case in cases.items()
    }
    if number == "0":
        told = {
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "costs": {name: one.model_dump(mode="json") for name, one in costs.items()},
        }
        print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1:])
