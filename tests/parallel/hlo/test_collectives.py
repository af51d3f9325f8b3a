"""Collectives: kinds, axes, bytes, counts, and conditionals."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshwright.configs.errors import MeshwrightError
from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel.hlo import collectives as hlo
from meshwright.parallel.mesh import make_mesh

MESH = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2, platform="cpu"))


REPEATED = PartitionSpec()


def compiled(f, *specs, out=REPEATED, shape=(8, 16)):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, spec)) for spec in specs]
    return jax.jit(f, out_shardings=NamedSharding(MESH, out)).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("tensor",), ("data", "tensor"), ("data", "fsdp", "tensor")])
def test_a_gather_is_found_with_its_axes_and_bytes(axes):
    operations = hlo.collectives(compiled(lambda x: x * 2, PartitionSpec(axes)), MESH)
    assert {(op.kind, op.axes) for op in operations} == {("all-gather", axes)}
    assert hlo.bytes_by_axes(operations) == {"all-gather": {"+".join(axes): 8 * 16 * 4}}


def test_loops_multiply_the_count_and_conditionals_are_marked():
    def loop(x):
        def body(total, _):
            summed = jax.lax.cond(total.sum() > 0, lambda t: jax.lax.psum(t, "data"), lambda t: t * 2.0, total)
            return jax.lax.ppermute(summed, "tensor", [(0, 1), (1, 0)]), None

        return jax.lax.scan(body, x, length=5)[0]

    mapped = jax.shard_map(
        loop, mesh=MESH, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"), check_vma=False
    )
    operations = {
        op.kind: op for op in hlo.collectives(compiled(mapped, PartitionSpec("data"), out=PartitionSpec("data")), MESH)
    }
    assert operations["collective-permute"].count == 5 and not operations["collective-permute"].under_conditional
    assert operations["collective-permute"].axes == ("tensor",)
    assert operations["all-reduce"].under_conditional and operations["all-reduce"].axes == ("data",)


def branching(in_branch):
    """A program with a permutation of `tensor` inside a branch (`permuted`), or behind it."""

    def turn(x):
        return jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])

    def choose(x):
        summed = jax.lax.cond(x.sum() > 0, turn if in_branch else lambda y: jax.lax.psum(y, "data"), lambda y: y * 2, x)
        return turn(summed)

    spec = PartitionSpec("data", "tensor")
    return compiled(jax.shard_map(choose, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False), spec, out=spec)


def test_a_permute_in_a_branch_is_refused_and_elsewhere_is_not():
    """Other collectives in a branch, and a permutation outside of it, are fine."""
    hlo.refuse_permute_under_conditional(branching(in_branch=False), MESH)
    with pytest.raises(MeshwrightError, match=r"collective-permute \S+ over tensor is inside .*ppermute"):
        hlo.refuse_permute_under_conditional(branching(in_branch=True), MESH)


def test_a_permute_in_a_loop_in_a_branch_is_refused():
    def turn(x):
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    def choose(x):
        loop = lambda y: jax.lax.fori_loop(0, 3, lambda _, z: turn(z), y)
        return jax.lax.cond(x.sum() > 0, loop, lambda y: y, x)

    spec = PartitionSpec("data")
    text = compiled(jax.shard_map(choose, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False), spec, out=spec)
    with pytest.raises(MeshwrightError, match="over data is inside a conditional"):
        hlo.refuse_permute_under_conditional(text, MESH)


@pytest.mark.parametrize("rounds", [1, None], ids=["known", "each device's own"])
def test_a_permute_in_a_loop_that_some_devices_skip_is_refused(rounds):
    def turn(x):
        return jax.lax.ppermute(x, "data", [(0, 1), (1, 0)])

    def loop(x):
        count = jax.lax.axis_index("tensor") if rounds is None else rounds
        return jax.lax.fori_loop(0, count, lambda _, y: turn(y) * 2, x)

    spec = PartitionSpec("data")
    text = compiled(jax.shard_map(loop, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=False), spec, out=spec)
    if rounds is None:
        with pytest.raises(MeshwrightError, match="over data is inside a conditional"):
            hlo.refuse_permute_under_conditional(text, MESH)
    else:
        hlo.refuse_permute_under_conditional(text, MESH)


GROUPS = {
    "list": ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
    "iota": ("replica_groups=[4,2]<=[8]", ("tensor",)),
    "iota transposed": ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
    "pairs": ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", ("fsdp",)),
    "mesh": ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}, dimensions={0}", ("data",)),
    "mesh transposed": (
        "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,2,2]T(0,2,1)) {'a'}, dimensions={0}",
        ("data", "tensor"),
    ),
    "part of a mesh axis": ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, dimensions={0}", ("tensor",)),
    "empty": ("replica_groups={}", ("data", "fsdp", "tensor")),
}


@pytest.mark.parametrize(("text", "axes"), GROUPS.values(), ids=GROUPS)
def test_every_form_of_groups_is_read(text, axes):
    assert hlo.varying_axes(f"%x = f32[4] all-reduce(%y), {text}, to_apply=%add", MESH) == axes


SIZES = {
    "plain": ("f32[8,16]{1,0} all-gather(%x), dimensions={0}", 512),
    "several": ("(f32[8]{0}, bf16[4,2]{1,0}) all-reduce(%x, %y), to_apply=%add", 48),
    "small numbers": ("(f8e4m3fn[16]{0}, s4[16]{0}, pred[16]{0}) all-to-all(%x, %y, %z)", 40),
    "a started gather": ("(f32[4]{0}, f32[8]{0}) all-gather-start(%x), dimensions={0}", 32),
    "a started permutation": ("(f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x)", 16),
    "a started reduction": ("(f32[4]{0}, f32[8]{0}) all-reduce-start(%x, %y), to_apply=%add", 48),
}


@pytest.mark.parametrize(("line", "size"), SIZES.values(), ids=SIZES)
def test_bytes_are_those_of_the_result(line, size):
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  %one = {line}\n}}\n"
    (operations,) = hlo.collectives(text, MESH)
    assert (operations.name, operations.bytes, operations.count) == ("one", size, 1)


def small_mesh(**axes):
    return make_mesh(MeshConfig(**axes, platform="cpu"), devices=jax.devices()[: math.prod(axes.values())])


TPU = {
    "scan_gather": {("all-gather", ("data",), 2 * 1024 * 1024, 7, False)},
    "nested_scan": {
        ("all-reduce", ("data",), 4 * 256 * 1024, 15, False),
        ("collective-permute", ("pipe",), 4 * 256 * 1024, 5, False),
    },
    "count_down": {("collective-permute", ("pipe",), 4 * 256 * 512, 5, False)},
    "pallas_kernel": {("collective-permute", ("pipe",), 4 * 256 * 512, 7, False)},
    "switch": {
        ("all-reduce", ("data",), 4 * 256 * 512, 7, True),
        ("collective-permute", ("pipe",), 4 * 256 * 512, 7, False),
    },
    "permute_in_switch": {("collective-permute", ("pipe",), 4 * 256 * 512, 7, True)},
    "dynamic_count": {("collective-permute", ("pipe",), 4 * 256 * 512, 1, True)},
    "data_dependent": {
        ("all-reduce", ("data", "pipe"), 4, 1, True),
        ("collective-permute", ("pipe",), 4 * 256 * 512, 1, True),
    },
}


def summary(text, mesh):
    return [(op.kind, tuple(sorted(op.axes)), op.bytes, op.count, op.under_conditional)
            for op in hlo.collectives(text, mesh)]  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), TPU.items(), ids=TPU)
def test_collectives_of_libtpu(printed, name, expected):
    found = summary(printed[name], small_mesh(pipe=2, data=2))
    assert set(found) == expected and len(found) == len(expected)


@pytest.mark.parametrize("name", [*TPU, "pipeline"])
def test_libtpus_permutes_are_refused_only_where_devices_may_skip_them(printed, name):
    mesh = small_mesh(pipe=4, tensor=2) if name == "pipeline" else small_mesh(pipe=2, data=2)
    if name in ("permute_in_switch", "dynamic_count", "data_dependent"):
        with pytest.raises(MeshwrightError, match="over pipe is inside a conditional"):
            hlo.refuse_permute_under_conditional(printed[name], mesh)
    else:
        hlo.refuse_permute_under_conditional(printed[name], mesh)


def test_a_pipeline_of_30_rounds_on_tpus_sends_to_both_neighbours_in_each(printed):
    mesh = small_mesh(pipe=4, tensor=2)
    sent = [op.count for op in hlo.collectives(printed["pipeline"], mesh) if op.axes == ("pipe",)]
    assert sent == [30, 30]


def test_a_gather_that_libtpu_spreads_over_fusions_counts_once(printed):
    """The second gather is in a fusion that starts it, one that goes on beside a product, and one that ends it."""
    text = printed["async_fusion"]
    assert text.count(" all-gather(") == 4 and text.count("async_collective_fusion_config") == 3
    found = summary(text, small_mesh(pipe=2, data=2))
    assert found.count(("all-gather", ("data", "pipe"), 2 * 2048 * 2048, 7, False)) == 2
    assert [one[0] for one in found].count("all-gather") == 2


def test_a_reduce_scatter_that_libtpu_keeps_as_a_sum_and_a_slice_is_one(printed):
    """2048 rows over four devices, padded to 528 on each."""
    found = summary(printed["async_fusion"], small_mesh(pipe=2, data=2))
    assert ("reduce-scatter", ("data", "pipe"), 2 * 528 * 2048, 7, False) in found
    assert not [one for one in found if one[0] == "all-reduce"]


def test_a_collective_on_the_sparse_core_counts(printed):
    found = summary(printed["sparse_core"], small_mesh(pipe=2, data=2))
    assert found.count(("reduce-scatter", ("data", "pipe"), 2 * 512 * 2048, 7, False)) == 1


# After the tests of XLA: `async-start` and `async-done` name what they run, and so did `async-update`.
GPU = """
%wrapped_reduce-scatter (x: f32[8]) -> f32[4] {
  %x = f32[8]{0} parameter(0)
  ROOT %rs = f32[4]{0} reduce-scatter(%x), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%sum
}

ENTRY %main (p: f32[8]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  %start = ((f32[8]{0}), f32[4]{0}) async-start(%p), calls=%wrapped_reduce-scatter
  %update = ((f32[8]{0}), f32[4]{0}) async-update(%start), calls=%wrapped_reduce-scatter
  %done = f32[4]{0} async-done(%update), calls=%wrapped_reduce-scatter
  %short = ((f32[8]{0}), f32[4]{0}) reduce-scatter-start(%p), channel_id=2, replica_groups={{0,2},{1,3}}, to_apply=%sum
  %short-done = f32[4]{0} reduce-scatter-done(%short)
  %ag = (f32[4]{0}, f32[8]{0}) all-gather-start(%done), channel_id=3, replica_groups=[2,2]<=[4], dimensions={0}
  %ag-done = f32[8]{0} all-gather-done(%ag)
  %ar = f32[4]{0} all-reduce-start(%done), channel_id=4, replica_groups=[1,4]<=[4], to_apply=%sum
  %ar-done = f32[4]{0} all-reduce-done(%ar)
  %cp = (f32[4]{0}, f32[4]{0}) collective-permute-start(%done), channel_id=5, source_target_pairs={{0,2},{2,0}}
  %cp-done = f32[4]{0} collective-permute-done(%cp)
  %a2a = ((f32[4]{0}, f32[4]{0}), (f32[4]{0}, f32[4]{0})) all-to-all-start(%done, %done), replica_groups={{0,1},{2,3}}
  ROOT %a2a-done = (f32[4]{0}, f32[4]{0}) all-to-all-done(%a2a)
}
"""


def test_collectives_of_gpus_count_once():
    assert summary(GPU, small_mesh(pipe=2, data=2)) == [
        ("reduce-scatter", ("data",), 16, 1, False),
        ("reduce-scatter", ("pipe",), 16, 1, False),
        ("all-gather", ("data",), 32, 1, False),
        ("all-reduce", ("data", "pipe"), 16, 1, False),
        ("collective-permute", ("pipe",), 16, 1, False),
        ("all-to-all", ("data",), 32, 1, False),
    ]
