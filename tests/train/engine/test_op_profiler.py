"""Timing the ops of a pipelined run, and the picture that the report makes of it."""

import jax
import pytest
from support.equivalence import batches, initial_state, tiny

from meshwright.parallel.layout import reorder_layers
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.pipeline.tables.costs import Costs
from meshwright.train.engine import op_profiler as module
from meshwright.train.engine.host_data import make_global_arrays
from meshwright.train.engine.op_profiler import measure_costs
from meshwright.train.engine.program import build
from meshwright.train.report.pipeline_picture import schedule_picture

CONFIG = tiny(mesh={"pipe": 2}, microbatches=4, pipeline={"schedule": "zb-h1"})


@pytest.fixture(scope="module")
def timed():
    """What was run, as (op, repeats, last) of the first device and tick, and the costs."""
    mesh = make_mesh(CONFIG.mesh)
    program = build(CONFIG, mesh)
    state = jax.device_put(reorder_layers(initial_state(CONFIG), before=None, after=program.order), program.shardings)
    batch = make_global_arrays(batches(CONFIG, 1)[0], CONFIG, mesh)
    ran = []

    def median_seconds(compiled, rows):
        jax.block_until_ready(compiled(rows))
        ran.append(tuple(int(rows[name][0, 0]) for name in ("op", "repeats", "last")))
        return [1.0, 1.5, 3.0, 5.0, 6.0, 9.0][len(ran) - 1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "median_seconds", median_seconds)
        return ran, measure_costs(program, state.params, state.frozen, batch)


def test_every_op_is_measured_by_itself_without_the_idle_time(timed):
    ran, costs = timed
    assert ran == [(0, 0, 0), (0, 0, 0), (1, 1, 0), (2, 1, 0), (3, 1, 0), (2, 1, 1)]
    ticks = module.TICKS
    assert costs.tick == 0.5 / (module.LONG_TICKS - ticks)
    assert (costs.forward, costs.input_gradient) == (2 / ticks, 4 / ticks)
    assert (costs.weight_gradient, costs.head_input_gradient, costs.vocabulary_s) == (5 / ticks, 4 / ticks, None)


def test_the_report_draws_the_schedule_on_the_measured_clock():
    costs = Costs(forward=0.002, input_gradient=0.004, weight_gradient=0.002, tick=0.0001)
    config = CONFIG.model_dump(mode="json")
    measured = {"schedule": "zb-h1", "devices": 2, "repeats": [1, 1], "costs": costs.model_dump(mode="json")}
    page = schedule_picture(config, measured)
    assert "<svg" in page and "zb-h1: 2 stages on 2 devices, 4 microbatches" in page and "4 ms" in page
    assert schedule_picture(config, {}) is None
    assert schedule_picture(config, measured | {"schedule": "1f1b"}) is None, "measured under another schedule"
    assert schedule_picture(tiny().model_dump(mode="json"), measured | {"devices": 1}) is None
