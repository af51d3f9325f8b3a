"""The rotations of a config.json <-> `model.rope`: both of transformers' spellings in, version 4's out.

version 4: rope_theta, rope_scaling {type or rope_type, ...}, rope_local_base_freq
version 5: rope_parameters {rope_theta, rope_type, ...}, or one such by layer type
"""

from collections.abc import Mapping
from typing import Any

from .errors import UserError

# rope type -> (our key -> theirs). A key of theirs that is not listed is refused: it might matter.
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
# Of these values a key means what we compute.
ACCEPTED_VALUES = {"partial_rotary_factor": 1.0, "truncate": True, "type": None, "rope_type": None, "rope_theta": None}


def read_rope(tree: Mapping[str, Any], *, local: bool) -> dict[str, Any]:
    """`model.rope` of a config.json; `local`: layers with a window turn by a base of their own.

    Raises UserError for a stretching we do not compute.
    """
    whole = tree.get("rope_parameters") or {}
    inner = whole.get("full_attention", whole)
    stretch = tree.get("rope_scaling") or inner
    given = {key: value for key, value in {**inner, **stretch}.items() if value is not None}
    found: dict[str, Any] = {"theta": float(given.get("rope_theta", tree.get("rope_theta", 10000.0)))}
    kind = stretch.get("rope_type", stretch.get("type", "default"))
    scaling = "none" if kind == "default" else kind
    if scaling not in SCALINGS:
        raise UserError(
            f"model.from: config.json: rope_type: {kind!r} is not one of default, "
            f"{', '.join(name for name in SCALINGS if name != 'none')}; no exact import, use another model"
        )
    names = SCALINGS[scaling]
    for key, value in given.items():
        if key not in names.values() and ACCEPTED_VALUES.get(key, object()) not in (None, value):
            raise UserError(
                f"model.from: config.json: {key}: {value!r} of rope_type {kind} is not what this decoder computes; "
                "no exact import, use another model"
            )
    found |= {"scaling": scaling} | {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    if scaling == "yarn" and "original_length" not in found:
        found["original_length"] = tree["max_position_embeddings"]
    if local:
        turn = whole.get("sliding_attention", {})
        if turn.get("rope_type", "default") != "default":
            raise UserError(
                f"model.from: config.json: rope_parameters.sliding_attention: {turn!r} is stretched, which only full "
                "attention is here; no exact import, use another model"
            )
        found["local_theta"] = float(turn.get("rope_theta", tree.get("rope_local_base_freq", 10000.0)))
    return found


def write_rope(rope: Any, *, local: bool) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and, with `local`, `rope_local_base_freq` of `rope` (a RopeConfig)."""
    given = {theirs: getattr(rope, ours) for ours, theirs in SCALINGS[rope.scaling].items()}
    scaling = {"rope_type": rope.scaling} | {key: value for key, value in given.items() if value is not None}
    tree: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None if rope.scaling == "none" else scaling}
    if local:
        tree["rope_local_base_freq"] = rope.theta if rope.local_theta is None else rope.local_theta
    return tree
