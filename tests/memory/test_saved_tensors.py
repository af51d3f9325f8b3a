"""What each policy saves, recomputes and offloads, read from the jaxpr of the backward pass."""

import jax
import numpy as np
import pytest
from support.blocks import POST_NORMS, backward, flops, residuals
from support.equivalence import tiny

from meshwright.configs.names import POLICY_TENSORS
from meshwright.configs.sections.model import FAMILIES
from meshwright.memory import jaxpr_stats, policy
from meshwright.parallel.mesh import make_mesh
from meshwright.train.engine.program import build


@pytest.mark.parametrize("name", POLICY_TENSORS)
def test_each_decision_does_what_it_says(name):
    """An offload is one copy to the host and one back."""
    assert residuals({"policy": "full", "names": {name: "keep"}}, **POST_NORMS) == ({name}, 0)
    assert residuals({"names": {name: "recompute"}}, **POST_NORMS) == (set(POLICY_TENSORS) - {name}, 0)
    offload = {"policy": "full", "names": {name: "offload"}}
    assert residuals(offload, **POST_NORMS) == (set(), 1)
    moves = [
        eqn for eqn, _ in jaxpr_stats.equations(backward(offload, **POST_NORMS)) if eqn.primitive.name == "device_put"
    ]
    assert [eqn.outvars[0].aval.memory_space for eqn in moves] == [jax.memory.Space.Host, jax.memory.Space.Device]


@pytest.mark.parametrize("preset", sorted(set(policy.PRESETS) - {"none"}))
def test_a_preset_saves_what_it_lists(preset):
    decisions = policy.PRESETS[preset]
    kept = {name for name, decision in decisions.items() if decision == "keep"}
    assert residuals({"policy": preset}, **POST_NORMS) == (kept, list(decisions.values()).count("offload"))


def test_none_saves_everything():
    assert residuals({"policy": "none"}, **POST_NORMS) == (set(POLICY_TENSORS), 0)


def test_minimal_recomputes_no_matrix_product():
    assert flops({"policy": "minimal"}) == flops({"policy": "none"}) < flops({"policy": "full"})


def test_attention_is_recomputed_unless_its_output_and_log_sum_exp_are_both_kept():
    """q, k, v are recomputed in all three: the scores, and the average over values, make the difference."""
    batch, tokens, heads, head_dim = 2, 8, 4, 4
    scores = 2 * batch * heads * tokens * tokens * head_dim
    both, full = flops({"policy": "attention-out"}), flops({"policy": "full"})
    assert full - both == 2 * scores
    assert flops({"policy": "full", "names": {"attn_out": "keep"}}) - both == scores
    assert flops({"policy": "full", "names": {"attn_lse": "keep"}}) - both == 2 * scores


@pytest.mark.parametrize("family", FAMILIES)
def test_emitted_tensors_are_the_checkpoint_names_of_a_block(family):
    model = {"family": family, "max_positions": 16}
    names = jaxpr_stats.checkpoint_names(backward({}, **model))
    assert sorted(names) == sorted(policy.emitted_tensors(tiny(model=model).model))


def temporary_bytes(preset):
    """Temporary memory of the gradient of eight layers; the logits, which no policy covers, are small."""
    config = tiny(model={"layers": 8, "vocab": 8}, data={"sequence_length": 64}, memory={"policy": preset})
    program = build(config, make_mesh(config.mesh))
    with jax.set_mesh(program.mesh):
        gradient = jax.jit(jax.grad(lambda params, batch: program.evaluate(params, {}, batch)[0]))
        compiled = gradient.lower(program.shapes.params, program.batch_shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_less_kept_is_less_temporary_memory():
    assert temporary_bytes("none") > temporary_bytes("minimal") > temporary_bytes("full")


def test_flops_are_counted_through_loops():
    def scanned(x):
        return jax.lax.scan(lambda y, _: (y @ y, None), x, length=3)[0]

    traced = jax.make_jaxpr(scanned)(jax.ShapeDtypeStruct((4, 4), np.float32))
    assert jaxpr_stats.matmul_flops(traced) == 3 * 2 * 4**3
