"""A whole run of replicas: stopped and gone on, evaluated and used by its outer parameters."""

import shutil

import jax
import numpy as np
import pytest
from support.equivalence import tiny
from support.run_files import losses

from meshwright.configs.errors import UserError
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.infer import inference_session
from meshwright.train.run import train


def small(**changes):
    base = {
        "steps": 6,
        "mesh": {"replica": 2, "tensor": 2},
        "outer": {"name": "streaming", "every": 2, "fragments": 2, "wire": "e3m0", "memory": "host"},
        "model": {"vocab": 384},
        "checkpoint": {"every": 3},
        "evaluation": {"every": 3},
        "logging": {"every": 1, "tensorboard": False},
    }
    return tiny(**{**base, **changes})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("uninterrupted")
    return root, train(small(), process_info=ProcessInfo(), root=root)


def test_a_restart_between_two_outer_steps_gives_the_same_bits(uninterrupted, tmp_path):
    """From the checkpoint of step 3, where replicas differ and a fragment is under way."""
    root, summary = uninterrupted
    shutil.copytree(root / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    again = train(small(), process_info=ProcessInfo(), root=tmp_path)
    expected = losses(root / "run")
    assert losses(tmp_path / "run") == {step: expected[step] for step in (4, 5, 6)}
    assert again.metrics["held_out_loss"] == summary.metrics["held_out_loss"]


def test_a_run_is_evaluated_and_used_with_its_outer_parameters(uninterrupted):
    root, summary = uninterrupted
    found = inference_session.evaluate(root / "run", [])
    assert found["held_out_loss"] == pytest.approx(summary.metrics["held_out_loss"], rel=1e-5)
    program, state = inference_session.load_program(inference_session.inference_config(root / "run", []), root / "run")
    params, anchor = program.eval_params(state), state.outer.anchor
    jax.tree.map(np.testing.assert_array_equal, params, anchor)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(anchor)} == {"pinned_host"}
    assert not np.array_equal(anchor["head"]["kernel"], state.params["head"]["kernel"][0])


def test_another_number_of_replicas_or_another_rule_is_another_run(uninterrupted):
    for changes, key in (
        ({"mesh": {"replica": 4}}, "mesh.replica"),
        ({"outer": {"name": "diloco", "every": 2}}, "outer.fragments"),
    ):
        with pytest.raises(UserError, match=f"{key}="):
            train(small(**changes), process_info=ProcessInfo(), root=uninterrupted[0])
