"""Bytes: what is predicted from a configuration is what the compiled meetings carry, and how much less that is."""

import math

import pytest
from support.equivalence import tiny

from meshwright.configs.sections.outer import OuterConfig
from meshwright.parallel.hlo import collectives
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.outer import traffic as lowcomm_bytes
from meshwright.train.engine.program import build

WIDE = {"embed": 128, "heads": 4, "kv_heads": 4, "mlp": 128, "vocab": 128}
CASES = {
    "diloco": ({"name": "diloco", "every": 4}, {"replica": 2}),
    "diloco, 4 bits": ({"name": "diloco", "every": 4, "wire": "e3m0"}, {"replica": 4}),
    "streaming": ({"name": "streaming", "every": 4, "fragments": 3, "wire": "int8"}, {"replica": 2, "fsdp": 2}),
    "noloco": ({"name": "noloco", "every": 4, "wire": "bf16"}, {"replica": 4, "tensor": 2}),
}


def carried(compiled, program):
    """Bytes that leave one replica in a compiled meeting, by the ring or the pairs that its collectives are."""
    replicas = program.mesh.shape["replica"]
    devices = program.mesh.size // replicas
    share = {
        "all-reduce": 2 * (replicas - 1) / replicas,
        "all-gather": (replicas - 1) / replicas,  # of the gathered array
        "collective-permute": 1,
    }
    found = [one for one in collectives(compiled.as_text(), program.mesh) if "replica" in one.axes]
    if any(one.kind == "collective-permute" for one in found):  # one of the patterns is chosen
        share["collective-permute"] = 1 / (replicas - 1)
    return sum(devices * share[one.kind] * one.bytes * one.count for one in found)


@pytest.mark.parametrize(("outer", "mesh"), CASES.values(), ids=CASES)
def test_predicted_bytes_are_those_of_the_compiled_meetings(outer, mesh):
    config = tiny(outer=outer, mesh=mesh, model=WIDE)
    program = build(config, make_mesh(config.mesh))
    sending = {meeting.name: meeting for meeting in program.replicas.outer.meetings}
    for one in program.traffic:
        compiled = program.replicas.compile_outer_step(sending[one.name], program.shapes, program.shardings)
        assert one.bytes == pytest.approx(carried(compiled, program), rel=0.02), one.name
        assert (one.every, one.offset) == sending[one.name][1:3]


def test_predicted_bytes_of_routing_are_those_of_the_compiled_step():
    outer = {"name": "noloco", "every": 2, "routing": True}
    config = tiny(
        outer=outer,
        mesh={"replica": 2, "pipe": 2, "fsdp": 2},
        microbatches=2,
        pipeline={"schedule": "zb-v"},
        model={"layers": 4},
    )
    program = build(config, make_mesh(config.mesh))
    meeting, routing = program.traffic
    assert meeting.name == "meet" and routing.every == 1
    crossing = [one for one in collectives(program.compiled_step().as_text(), program.mesh) if "replica" in one.axes]
    assert {one.kind for one in crossing} == {"collective-permute"}
    devices = program.mesh.size // 2
    assert routing.bytes == pytest.approx(sum(devices * one.bytes * one.count for one in crossing), rel=0.02)


# A decoder of 24 layers of 1024, as canonical shapes.
SHAPES = {f"layers/{layer}/mlp/{part}/kernel": (1024, 4096) for layer in range(24) for part in ("up", "down", "gate")}


def traffic(section, replicas=2):
    return lowcomm_bytes.traffic(OuterConfig(every=100, **section), SHAPES, layers=24, replicas=replicas)


def test_four_bits_every_hundred_updates_are_hundreds_of_times_fewer_and_fragments_cut_the_peak():
    vanilla, streamed = traffic({"name": "diloco"}), traffic({"name": "streaming", "fragments": 9, "wire": "e3m0"})
    numbers = lowcomm_bytes.summary(streamed, SHAPES, replicas=2)
    assert numbers["times_fewer_bytes"] == pytest.approx(100 * 32 / 4.5)  # half a bit a value is its scale's
    assert lowcomm_bytes.peak(vanilla) == 4 * 24 * 3 * 1024 * 4096
    whole = lowcomm_bytes.peak(traffic({"name": "diloco", "wire": "e3m0"}))
    assert lowcomm_bytes.peak(streamed) == whole / 8


def test_what_was_sent_is_the_sum_over_the_meetings_that_were():
    meetings = traffic({"name": "streaming", "fragments": 4})
    for update in (0, 99, 100, 124, 125, 260, 400):
        held = [one for one in meetings for past in range(1, update + 1)
                if past >= one.offset + one.every and (past - one.offset) % one.every == 0]  # fmt: skip
        assert lowcomm_bytes.sent(meetings, update) == sum(one.bytes for one in held)


def test_pairs_send_the_same_however_many_replicas_there_are():
    few, many = (traffic({"name": "noloco"}, replicas)[0].bytes for replicas in (4, 1024))
    assert few == many == 2 * 4 * sum(map(math.prod, SHAPES.values()))
