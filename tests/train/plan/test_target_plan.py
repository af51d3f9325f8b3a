"""What a plan for a target reads from the compiler's refusal, and what it suggests."""

import pytest

from meshwright.configs.hardware_targets import parse_topology
from meshwright.configs.loader import load_config
from meshwright.train.plan import target_plan
from meshwright.train.plan.target_plan import fitting_changes, needed_bytes


@pytest.mark.parametrize(
    ("text", "gigabytes"),
    [
        ("total memory required for HLO temporaries (447.03G) exceeds available HBM (30.75G).", 447.03),
        ("Ran out of memory in memory space hbm. Used 39.11G of 31.25G hbm.", 39.11),
    ],
)
def test_the_bytes_needed_are_read_from_the_refusal(text, gigabytes):
    assert needed_bytes(RuntimeError(f"RESOURCE_EXHAUSTED: {text}")) == int(gigabytes * 2**30)
    assert needed_bytes(RuntimeError("INTERNAL: something else")) is None


def test_the_first_three_changes_that_fit_are_suggested(monkeypatch):
    """A run that fits with half of the activations, or with recomputation."""
    tried = []

    def plan_target(config, overrides, topology, *, find_savings):
        assert not find_savings
        tried.append(overrides)
        fits = any(change.startswith(("microbatches", "memory.policy=full")) for change in overrides)
        return type("Plan", (), {"fits": fits, "peak_bytes": 5})

    monkeypatch.setattr(target_plan, "plan_target", plan_target)
    config = load_config("pretrain/llama-1b")
    found = fitting_changes("pretrain/llama-1b", ["seed=1"], parse_topology("v5e:4x4"), config)
    assert found == {"microbatches=8": 5, "memory.policy=full": 5, "memory.policy=full microbatches=16": 5}
    assert all(overrides[0] == "seed=1" for overrides in tried)
