"""Memory policies do not change results, scanned or unrolled, and unknown names are refused."""

import functools

import jax
import numpy as np
import pytest
from support.equivalence import batches, initial_state, tiny

from meshwright.configs.errors import UserError
from meshwright.memory import policy
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.program import build

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@functools.lru_cache
def gradient(policy_name, names=(), *, scan=True):
    """Loss and gradient of a batch, with dropout, under `policy_name` and (name, decision) pairs."""
    memory = {"policy": policy_name, "names": dict(names)}
    config = tiny(memory=memory, model={"scan": scan})
    program = build(config, make_mesh(config.mesh))
    with jax.set_mesh(program.mesh):
        loss = jax.jit(jax.value_and_grad(lambda params, batch: program.evaluate(params, {}, batch)[0]))
        return jax.device_get(loss(initial_state(config).params, batches(config, 1)[0]))


@pytest.mark.parametrize("preset", sorted(set(policy.PRESETS) - {"none"}))
def test_a_preset_does_not_change_the_gradient(preset):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), gradient("none"), gradient(preset))


def test_decisions_do_not_change_the_gradient_of_unrolled_blocks():
    names = (("block_in", "offload"), ("mlp_up", "recompute"), ("q", "keep"))
    actual = gradient("none", names, scan=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), gradient("none"), actual)


def test_an_unknown_name_is_refused_with_the_known_names():
    memory = tiny(memory={"names": {"mlp_upp": "keep"}}).memory
    with pytest.raises(UserError, match=r"memory.names: mlp_upp matches nothing; .*Did you mean mlp_up\?"):
        policy.tensor_decisions(memory, tensors=policy.emitted_tensors(tiny().model))


def test_a_tensor_of_another_architecture_is_refused():
    model = tiny(model={"activation": "gelu"}).model
    with pytest.raises(UserError, match=r"memory.names: mlp_gate matches nothing"):
        policy.tensor_decisions(
            tiny(memory={"names": {"mlp_gate": "keep"}}).memory, tensors=policy.emitted_tensors(model)
        )


def test_names_override_a_preset_and_the_default_wraps_nothing():
    decisions = policy.tensor_decisions(
        tiny(memory={"policy": "minimal", "names": {"q": "recompute"}}).memory,
        tensors=policy.emitted_tensors(tiny().model),
    )
    assert decisions == policy.PRESETS["minimal"] | {"q": "recompute"}
    assert policy.tensor_decisions(tiny().memory, tensors=policy.emitted_tensors(tiny().model)) is None
    block = object()
    assert policy.make_remat(None, scanned=True)(block) is block


@pytest.mark.parametrize("preset", policy.PRESETS)
def test_a_preset_is_known_to_offload_before_jax_is_needed(preset):
    plain, moved, kept = (
        tiny(memory={"policy": preset, "names": names}).memory.offloads
        for names in ({}, {"q": "offload"}, {"block_in": "keep"})
    )
    assert plain == ("offload" in policy.PRESETS[preset].values())
    assert moved and not kept
