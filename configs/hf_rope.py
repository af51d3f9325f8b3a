"""Rotary position embedding in a config.json <-> `model.rope`. Reads both spellings of transformers, writes version 4.

version 4: rope_theta, rope_scaling {type or rope_type, ...}, rope_local_base_freq version 5: rope_parameters
{rope_theta, rope_type, ...}, or one of these per layer type
"""

from collections.abc import Mapping
from typing import Any

from .errors import UserError

# rope_type -> (our key -> theirs). A key of theirs that is not listed might change the result, so it is refused.
SCALINGS: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}
# With these values the key changes nothing that we compute.
ACCEPTED_VALUES = {"partial_rotary_factor": 1.0, "truncate": True, "type": None, "rope_type": None, "rope_theta": None}


def read_rope(tree: Mapping[str, Any], *, local: bool) -> dict[str, Any]:
    """`model.rope` of a config.json; `local`: layers with a window have their own theta.

    Raises UserError for a scaling that is not supported.
    """
    parameters = tree.get("rope_parameters") or {}
    inner = parameters.get("full_attention", parameters)
    stretch = tree.get("rope_scaling") or inner
    settings = {key: value for key, value in {**inner, **stretch}.items() if value is not None}
    rope: dict[str, Any] = {"theta": float(settings.get("rope_theta", tree.get("rope_theta", 10000.0)))}
    kind = stretch.get("rope_type", stretch.get("type", "default"))
    scaling = "none" if kind == "default" else kind
    if scaling not in SCALINGS:
        raise UserError(
            f"model.from: config.json: rope_type: {kind!r} is not one of default, "
            f"{', '.join(name for name in SCALINGS if name != 'none')}; use another model"
        )
    names = SCALINGS[scaling]
    for key, value in settings.items():
        if key not in names.values() and ACCEPTED_VALUES.get(key, object()) not in (None, value):
            raise UserError(
                f"model.from: config.json: {key}: {value!r} is not supported for rope_type {kind}; use another model"
            )
    rope |= {"scaling": scaling} | {ours: settings[theirs] for ours, theirs in names.items() if theirs in settings}
    if scaling == "yarn" and "original_length" not in rope:
        rope["original_length"] = tree["max_position_embeddings"]
    if local:
        sliding = parameters.get("sliding_attention", {})
        if sliding.get("rope_type", "default") != "default":
            raise UserError(
                f"model.from: config.json: rope_parameters.sliding_attention: {sliding!r} is scaled, which is "
                "supported for full attention only; use another model"
            )
        rope["local_theta"] = float(sliding.get("rope_theta", tree.get("rope_local_base_freq", 10000.0)))
    return rope


def write_rope(rope: Any, *, local: bool) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and, with `local`, `rope_local_base_freq` of `rope` (a RopeConfig)."""
    settings = {theirs: getattr(rope, ours) for ours, theirs in SCALINGS[rope.scaling].items()}
    scaling = {"rope_type": rope.scaling} | {key: value for key, value in settings.items() if value is not None}
    tree: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None if rope.scaling == "none" else scaling}
    if local:
        tree["rope_local_base_freq"] = rope.theta if rope.local_theta is None else rope.local_theta
    return tree
