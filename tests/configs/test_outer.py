"""The section outer: the defaults of each rule, and refused conflicts."""

import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.loader import dump_yaml, parse_yaml, validate_tree
from meshwright.configs.sections.outer import RULES, OuterConfig

MESH = {"replica": 2, "platform": "cpu"}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_has_its_defaults_and_loads_again_equal(name):
    config = validate_tree({"mesh": MESH, "outer": {"name": name}})
    assert {key: getattr(config.outer, key) for key in RULES[name]} == RULES[name]
    assert validate_tree(parse_yaml(dump_yaml(config), origin="dump")) == config


REFUSED = {
    "no outer": ({"mesh": MESH}, "mesh.replica: 2 "),
    "no replicas": ({"outer": {"name": "noloco"}}, "outer.name: noloco "),
    "any number of replicas": ({"mesh": {"replica": -1}}, "mesh.replica: -1"),
    "a key of another rule": (
        {"outer": {"mix": 0.5}},
        "outer.mix: 0.5 .*diloco.*outer.name to streaming",
    ),
    "never": ({"mesh": MESH, "steps": 20, "outer": {}}, r"outer.every: 30 exceeds steps \(20\)"),
    "overlap": ({"outer": {"name": "streaming", "overlap": 30}}, r"outer.overlap: 30 must be below outer.every \(30\)"),
    "turns": ({"outer": {"name": "streaming", "every": 3}}, r"outer.fragments: 4 exceeds outer.every \(3\)"),
    "fragments": (
        {"mesh": MESH, "outer": {"name": "streaming", "fragments": 9}},
        "outer.fragments: 9 .*model.layers is 4; use at most 5",
    ),
    "apart": (
        {"mesh": {"replica": 8}, "outer": {"name": "noloco", "momentum": 0.9}},
        "outer.consensus: 0.7 .* 0.9 .*0.436",
    ),
    "parameters in 4 bits": ({"outer": {"name": "peer-average", "wire": "e3m0"}}, "outer.wire: e3m0 "),
    "two averages": ({"mesh": MESH, "outer": {}, "optimizer": {"ema": 0.9}}, "optimizer.ema: 0.9 with outer"),
    "routing of another rule": ({"outer": {"routing": True}}, "outer.routing: True .*diloco"),
    "routing without stages": (
        {"mesh": MESH, "outer": {"name": "noloco", "routing": True}},
        "outer.routing: true .*mesh.pipe is 1",
    ),
    "routing of three": (
        {"mesh": {"replica": 3, "pipe": 2}, "outer": {"name": "noloco", "routing": True}, "microbatches": 2}
        | {"data": {"global_batch": 12}},
        "outer.routing: true .*mesh.replica is 3",
    ),
    "routing and a shared vocabulary": (
        {"mesh": MESH | {"pipe": 2}, "outer": {"name": "noloco", "routing": True}, "microbatches": 2}
        | {"pipeline": {"schedule": "1f1b", "vocab_parallel": 2}},
        r"outer.routing: true with pipeline.vocab_parallel \(2\)",
    ),
    "rows": (
        {"mesh": {"replica": 3}, "outer": {}, "data": {"global_batch": 16}},
        r"global_batch: 16 is not divisible by replica x data x fsdp x microbatches \(3 x 1 x 1 x 1 = 3\)",
    ),
}


@pytest.mark.parametrize(("tree", "message"), REFUSED.values(), ids=REFUSED)
def test_the_refusal_of_a_conflict_names_key_and_value(tree, message):
    with pytest.raises(UserError, match=message):
        validate_tree(tree)


def test_an_unknown_wire_format_is_refused():
    with pytest.raises(ValueError, match="wire"):
        OuterConfig(wire="fp3")
