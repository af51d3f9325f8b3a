"""Traffic: bytes predicted from a configuration are those of the compiled outer steps."""

import math

import pytest
from support.equivalence import tiny

from meshwright.configs.sections.outer import OuterConfig
from meshwright.parallel.hlo.collectives import collectives
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.outer.traffic import bytes_sent, outer_traffic, peak_bytes, traffic_summary
from meshwright.train.engine.program import build

WIDE = {"embed": 128, "heads": 4, "kv_heads": 4, "mlp": 128, "vocab": 128}
CASES = {
    "diloco": ({"name": "diloco", "every": 4}, {"replica": 2}),
    "diloco, 4 bits": ({"name": "diloco", "every": 4, "wire": "e3m0"}, {"replica": 4}),
    "streaming": ({"name": "streaming", "every": 4, "fragments": 3, "wire": "int8"}, {"replica": 2, "fsdp": 2}),
    "noloco": ({"name": "noloco", "every": 4, "wire": "bf16"}, {"replica": 4, "tensor": 2}),
}


def compiled_bytes(compiled, program):
    """Bytes that leave op replica in a compiled outer step, from its ring and pair collectives."""
    replicas = program.mesh.shape["replica"]
    devices = program.mesh.size // replicas
    share = {
        "all-reduce": 2 * (replicas - 1) / replicas,
        "all-gather": (replicas - 1) / replicas,  # of the gathered array
        "collective-permute": 1,
    }
    crossing = [op for op in collectives(compiled.as_text(), program.mesh) if "replica" in op.axes]
    if any(op.kind == "collective-permute" for op in crossing):  # op of the patterns is chosen
        share["collective-permute"] = 1 / (replicas - 1)
    return sum(devices * share[op.kind] * op.bytes * op.count for op in crossing)


@pytest.mark.parametrize(("outer", "mesh"), CASES.values(), ids=CASES)
def test_predicted_bytes_are_those_of_the_compiled_outer_steps(outer, mesh):
    config = tiny(outer=outer, mesh=mesh, model=WIDE)
    program = build(config, make_mesh(config.mesh))
    outer_steps = {step.name: step for step in program.replicas.outer.outer_steps}
    for step in program.traffic:
        compiled = program.replicas.compile_outer_step(outer_steps[step.name], program.shapes, program.shardings)
        assert step.bytes == pytest.approx(compiled_bytes(compiled, program), rel=0.02), step.name
        assert (step.interval, step.offset) == outer_steps[step.name][1:3]


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
    outer_step, routing = program.traffic
    assert outer_step.name == "meet" and routing.interval == 1
    crossing = [op for op in collectives(program.compiled_step().as_text(), program.mesh) if "replica" in op.axes]
    assert {op.kind for op in crossing} == {"collective-permute"}
    devices = program.mesh.size // 2
    assert routing.bytes == pytest.approx(sum(devices * op.bytes * op.count for op in crossing), rel=0.02)


# A decoder of 24 layers of 1024, as canonical shapes.
SHAPES = {f"layers/{layer}/mlp/{part}/kernel": (1024, 4096) for layer in range(24) for part in ("up", "down", "gate")}


def traffic(section, replicas=2):
    return outer_traffic(OuterConfig(every=100, **section), SHAPES, layers=24, replicas=replicas)


def test_four_bits_every_hundred_updates_are_hundreds_of_times_fewer_and_fragments_cut_the_peak():
    vanilla, streamed = traffic({"name": "diloco"}), traffic({"name": "streaming", "fragments": 9, "wire": "e3m0"})
    numbers = traffic_summary(streamed, SHAPES, replicas=2)
    assert numbers["times_fewer_bytes"] == pytest.approx(100 * 32 / 4.5)  # half a bit a value is its scale's
    assert peak_bytes(vanilla) == 4 * 24 * 3 * 1024 * 4096
    unfragmented = peak_bytes(traffic({"name": "diloco", "wire": "e3m0"}))
    assert peak_bytes(streamed) == unfragmented / 8


def test_bytes_sent_are_the_sum_over_the_outer_steps_so_far():
    steps = traffic({"name": "streaming", "fragments": 4})
    for update in (0, 99, 100, 124, 125, 260, 400):
        done = [step for step in steps for past in range(1, update + 1)
                if past >= step.offset + step.interval and (past - step.offset) % step.interval == 0]  # fmt: skip
        assert bytes_sent(steps, update) == sum(step.bytes for step in done)


def test_pairs_send_the_same_however_many_replicas_there_are():
    few, many = (traffic({"name": "noloco"}, replicas)[0].bytes for replicas in (4, 1024))
    assert few == many == 2 * 4 * sum(map(math.prod, SHAPES.values()))
