"""The rules from names to mesh axes: what is sharded, replicated, refused."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from meshwright.configs.names import LOGICAL_AXES, MESH_AXES
from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel import sharding
from meshwright.parallel.mesh import make_mesh

MESH = make_mesh(MeshConfig(fsdp=2, seq=2, tensor=2, platform="cpu"))
STACKED = "segments/0/0/block/"

WEIGHTS = {
    "table": ("embed/embedding", (64, 16), ("tensor", "fsdp")),
    "head": ("head/kernel", (16, 64), ("fsdp", "tensor")),
    "stacked query": (STACKED + "attn/q/kernel", (3, 16, 4, 4), (None, "fsdp", "tensor", None)),
    "one key head is repeated": (STACKED + "attn/k/kernel", (3, 16, 1, 4), (None, "fsdp", None, None)),
    "output": (STACKED + "attn/o/kernel", (3, 4, 4, 16), (None, "tensor", None, "fsdp")),
    "stacked norm": (STACKED + "attn_norm/scale", (3, 16), (None, None)),
    "norm": ("final_norm/scale", (16,), (None,)),
    "bias": (STACKED + "mlp/up/bias", (3, 24), (None, "tensor")),
}


@pytest.mark.parametrize(("path", "shape", "axes"), WEIGHTS.values(), ids=WEIGHTS)
def test_a_weight_is_sharded_by_its_path(path, shape, axes):
    assert sharding.weight_spec(path, shape, mesh=MESH, zero=3) == PartitionSpec(*axes)
    without = [None if axis == "fsdp" else axis for axis in axes]
    assert sharding.weight_spec(path, shape, mesh=MESH, zero=1) == PartitionSpec(*without)


def test_every_name_has_a_rule_and_every_rule_an_axis():
    assert set(sharding.WEIGHT_RULES) == set(LOGICAL_AXES)
    for axes in (sharding.WEIGHT_RULES | sharding.ACTIVATION_RULES).values():
        assert set((axes,) if isinstance(axes, str) else axes or ()) <= set(MESH_AXES)


def test_a_dimension_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="dimension mlp of size 5 cannot be sharded over tensor"):
        sharding.weight_spec("segments/0/0/block/mlp/up/bias", (3, 5), mesh=MESH, zero=3)


FACTORED = {
    "the whole": ((3, 16, 24), (None, "fsdp", "tensor")),
    "rows": ((3, 16), (None, "fsdp")),
    "columns": ((3, 24), (None, "tensor")),
    "nothing": ((1,), ()),
}


@pytest.mark.parametrize(("statistic_shape", "axes"), FACTORED.values(), ids=FACTORED)
def test_statistics_keep_the_sharding_of_the_dimensions_they_have(statistic_shape, axes):
    whole = PartitionSpec(None, "fsdp", "tensor")
    assert sharding.statistic_spec(whole, (3, 16, 24), statistic_shape) == PartitionSpec(*axes)


def test_shard_counts_are_those_of_the_mesh_in_use():
    names = ("batch", "sequence", "block_sequence", "vocab")
    assert [sharding.shard_count(name) for name in names] == [1, 1, 1, 1]
    with jax.set_mesh(MESH):
        assert [sharding.shard_count(name) for name in names] == [2, 2, 4, 2]


def test_manual_axes_of_a_shard_map_do_not_count():
    counts = []

    def inside(x):
        counts.append(sharding.shard_count("block_sequence"))
        return x

    with jax.set_mesh(MESH):
        spec = PartitionSpec("tensor")
        jax.eval_shape(jax.shard_map(inside, in_specs=spec, out_specs=spec, axis_names={"tensor"}), jnp.zeros(4))
    assert set(counts) == {2}
