"""The section model: families are defaults, and settings without effect are refused."""

import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.loader import validate_tree

MISTAKES = {
    "no layers": ({"layers": 0}, r"model.layers: 0: "),
    "no key heads": ({"kv_heads": 0}, r"model.kv_heads: 0: "),
    "uneven groups": (
        {"heads": 6, "kv_heads": 4},
        r"model.kv_heads: 4 does not divide model.heads \(6\); use a divisor",
    ),
    "uneven width": ({"embed": 20, "heads": 6}, r"model.embed: 20 is not divisible by .*set model.head_dim"),
    "odd heads": ({"head_dim": 7}, r"model.head_dim: 7 must be even for rope.*set model.head_dim to 8"),
    "epsilon": ({"norm_epsilon": 0}, r"model.norm_epsilon: 0: "),
    "soft-cap": ({"logit_softcap": -1}, r"model.logit_softcap: -1: "),
    "attention soft-cap": ({"attention_softcap": 0}, r"model.attention_softcap: 0: "),
    "scale": ({"attention_scale": 0}, r"model.attention_scale: 0: "),
    "positions": ({"max_positions": 0}, r"model.max_positions: 0: "),
    "dropout": ({"dropout": 1.0}, r"model.dropout: 1.0: "),
    "window": ({"windows": [0, None]}, r"model.windows: \[0, None\] must list positive token counts"),
    "no window": ({"windows": []}, r"model.windows: \[\] must list positive token counts"),
    "offset": ({"norm": "layer", "norm_unit_offset": True}, r"model.norm_unit_offset: true has no effect.*norm: rms"),
    "rope without rope": (
        {"family": "gpt2", "rope": {"theta": 5e5}},
        r"model.rope: has no effect with model.position_encoding: learned; remove one",
    ),
    "local theta": ({"rope": {"local_theta": 100.0}}, r"model.rope.local_theta: 100.0 has no effect.*model.windows"),
    "cudnn": ({"attention": "cudnn", "attention_softcap": 50.0}, r"model.attention: cudnn cannot cap.*use auto"),
    "theta": ({"rope": {"theta": 1.0}}, r"model.rope.theta: 1.0: "),
    "shrinking": ({"rope": {"scaling": "linear", "factor": 0.5}}, r"model.rope.factor: 0.5: "),
    "factor alone": (
        {"rope": {"factor": 8.0}},
        r"model.rope.factor: 8.0 has no effect without .*linear, llama3 or yarn",
    ),
    "original length": ({"rope": {"original_length": 0}}, r"model.rope.original_length: 0: "),
    "llama3's factors": (
        {"rope": {"low_frequency_factor": 4.0}},
        r"model.rope.low_frequency_factor: 4.0 must be below model.rope.high_frequency_factor \(4.0\)",
    ),
    "yarn's betas": ({"rope": {"beta_fast": 1.0}}, r"model.rope.beta_slow: 1.0 must be below .*beta_fast \(1.0\)"),
    "yarn's factor": ({"rope": {"attention_factor": 0}}, r"model.rope.attention_factor: 0: "),
}


@pytest.mark.parametrize(("settings", "message"), MISTAKES.values(), ids=MISTAKES)
def test_the_refusal_of_a_model_names_key_value_and_remedy(settings, message):
    with pytest.raises(UserError, match=message):
        validate_tree({"model": settings})


def test_a_family_sets_defaults_and_the_users_value_wins():
    model = validate_tree({"model": {"family": "gemma3", "qk_norm": False, "rope": {"theta": 5e5}}}).model
    assert (model.post_norms, model.qk_norm) == (True, False)
    assert (model.rope.theta, model.rope.local_theta) == (5e5, 1e4)
    assert validate_tree({"model": {"family": "gemma3", "position_encoding": "none"}}).model.rope.theta == 1e4


def test_equal_models_have_equal_hashes():
    """So that a compiled program can be cached by its model."""
    one, other = (validate_tree({"model": {"windows": windows}}).model for windows in ([4, None], (4, None)))
    assert hash(one) == hash(other) and one == other
