"""Memory policies save what they say, change no number, and refuse names that nothing emits."""

import pytest

from equivalence import assert_same, tiny
from meshwright.configs.errors import UserError
from meshwright.memory import policy

MEMORIES = {name: {"policy": name} for name in policy.PRESETS if name != "none"} | {
    "names": {"names": {"mlp_up": "recompute", "block_in": "offload", "q": "keep"}}
}


@pytest.mark.parametrize("memory", MEMORIES.values(), ids=MEMORIES)
def test_a_policy_changes_no_number(memory):
    assert_same(tiny(), tiny(memory=memory), steps=2)


def test_a_name_that_nothing_emits_is_refused_with_what_there_is():
    with pytest.raises(UserError, match=r"memory.names: mlp_upp matches nothing; .*Did you mean mlp_up\?"):
        memory = tiny(memory={"names": {"mlp_upp": "keep"}}).memory
        policy.decisions(memory, tensors=policy.emitted(tiny().model))
