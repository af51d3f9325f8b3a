"""The decoder: causal, deterministic, the same scanned or unrolled, and able to learn."""

import numpy as np

from equivalence import assert_same, batches, tiny, to_devices
from meshwright.parallel.mesh import make_mesh
from meshwright.train.program import build


def test_unrolled_equals_scanned():
    model = {"layers": 3, "windows": [4, None]}
    assert_same(tiny(model=model), tiny(model=model | {"scan": False}), steps=2)


def test_a_two_layer_model_memorizes_one_batch():
    config = tiny(steps=60, optimizer={"weight_decay": 0.0})
    mesh = make_mesh(config.mesh)
    program = build(config, mesh)
    state, step = program.initialized(), program.compiled_step()
    batch = to_devices(batches(config, 1)[0], config, mesh)
    losses = []
    for _ in range(60):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > np.log(61) - 0.5 and losses[-1] < 0.5 * losses[0]
