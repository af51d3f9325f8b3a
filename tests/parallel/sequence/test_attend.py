"""Attention with rows sharded over `seq` equals dense attention on one device, with only the collectives it needs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from meshwright.configs.errors import UserError
from meshwright.configs.names import MESH_AXES
from meshwright.models.attention import blockwise
from meshwright.models.attention.interface import Mask, TokenIndices, attend
from meshwright.models.attention.registry import IMPLEMENTATIONS
from meshwright.parallel.hlo.collectives import collectives
from meshwright.parallel.sequence.attend import STRATEGIES, sequence_parallel
from meshwright.parallel.sequence.token_order import contiguous, zigzag

BATCH, TOKENS, HEADS, HEAD_DIM = 4, 32, 8, 4
DOCUMENTS = np.stack([np.repeat(np.arange(4), lengths) for lengths in ([3, 9, 13, 7], [20, 1, 1, 10])] * 2)

# mesh axes, kv_heads, mask, packed documents, order
CASES = {
    "causal": ({"data": 2, "seq": 4}, 8, Mask(), False, zigzag),
    "both-ways": ({"seq": 4}, 4, Mask(causal=False), False, zigzag),
    "window-softcap": ({"data": 2, "seq": 4}, 4, Mask(window=6, softcap=1.5), False, zigzag),
    "documents": ({"seq": 4}, 4, Mask(), True, zigzag),
    "documents-in-plain-order": ({"seq": 8}, 8, Mask(window=20), True, contiguous),
    "with-data-fsdp-tensor": ({"fsdp": 2, "seq": 2, "tensor": 2}, 4, Mask(window=20), True, zigzag),
    "one-head-repeated-for-tensor": ({"seq": 2, "tensor": 2}, 1, Mask(), False, zigzag),
}


def mesh_of(**axes):
    sizes = tuple(axes.get(axis, 1) for axis in MESH_AXES)
    return jax.make_mesh(
        sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=jax.devices()[: np.prod(sizes)]
    )


def arrays(kv_heads, dtype="float32"):
    """q, k, v, d_out of whole rows in plain order."""
    keys, heads = jax.random.split(jax.random.key(0), 4), (HEADS, kv_heads, kv_heads, HEADS)
    return [jax.random.normal(key, (BATCH, TOKENS, n, HEAD_DIM), dtype) for key, n in zip(keys, heads, strict=True)]


def results(attention, q, k, v, d_out):
    out, pull = jax.vjp(attention, q, k, v)
    return out, *pull(d_out)


def compiled(strategy, mesh, mask, indices, arguments, implementation="blockwise"):
    attention = sequence_parallel(IMPLEMENTATIONS[implementation], strategy=strategy, mesh=mesh)
    placed = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "seq", None, None))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for x in arguments]
    run = jax.jit(lambda *args: results(lambda q, k, v: attention(q, k, v, mask, indices), *args))
    return run.lower(*shapes).compile(), placed


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 4 tokens, so that a device has several and skips some."""
    for name, value in {"LONGEST_UNROLLED": 8, "SMALLEST_BLOCK": 4, "LARGEST_BLOCK": 4}.items():
        monkeypatch.setattr(blockwise, name, value)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_output_and_gradients_equal_dense_on_one_device(strategy, case):
    axes, kv_heads, mask, packed, ordered = case
    if strategy == "ulysses" and kv_heads < axes["seq"]:
        pytest.skip("refused: see test_ulysses_refuses")
    plain, order = arrays(kv_heads), ordered(TOKENS, ranks=axes["seq"])
    segments = (DOCUMENTS, DOCUMENTS) if packed else (None, None)
    reference = TokenIndices(None, None, *segments)
    whole = jax.jit(lambda *args: results(lambda *qkv: attend(IMPLEMENTATIONS["dense"], *qkv, mask, reference), *args))
    cut = [None if x is None else jnp.asarray(x[:, order], jnp.int32) for x in segments]
    index = (None, None) if ordered is contiguous else (jnp.asarray(order),) * 2
    implementation = "blockwise" if "tensor" in axes else "dense"  # the quick one to compile where either would do
    program, placed = compiled(strategy, mesh_of(**axes), mask, TokenIndices(*index, *cut), plain, implementation)
    got = program(*(jax.device_put(x[:, order], placed) for x in plain))
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), got, whole(*plain), strict=True):
        np.testing.assert_allclose(ours, exact[:, order], rtol=1e-5, atol=2e-5, err_msg=name)


COLLECTIVES = {
    "ring": {"collective-permute"},
    "all-gather": {"all-gather", "reduce-scatter", "all-reduce"},  # a compiler may write one as the other
    "ulysses": {"all-to-all"},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_the_strategys_collectives_run_and_only_over_seq(strategy):
    """Rows and heads do not move: nothing crosses data, fsdp or tensor."""
    mesh = mesh_of(data=2, seq=2, tensor=2)
    order = jnp.asarray(zigzag(TOKENS, ranks=2))
    index = (None, None) if strategy == "ulysses" else (order, order)
    attention = sequence_parallel(IMPLEMENTATIONS["blockwise"], strategy=strategy, mesh=mesh)
    placed = NamedSharding(mesh, PartitionSpec("data", "seq", "tensor", None))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for x in arrays(4)]
    run = jax.jit(lambda *args: results(lambda q, k, v: attention(q, k, v, Mask(), TokenIndices(*index)), *args))
    operations = collectives(run.lower(*shapes).compile().as_text(), mesh)
    assert operations and {op.kind for op in operations} <= COLLECTIVES[strategy]
    assert {op.axes for op in operations} == {("seq",)}
    assert not any(op.under_conditional for op in operations), "devices may take different branches"


@pytest.mark.parametrize("strategy", ["all-gather", "ring"])
def test_bfloat16_shards_are_added_in_float32(strategy):
    """The result of eight shards is as close to the exact one as that of unsharded bfloat16."""
    mesh, plain = mesh_of(seq=8), arrays(8, "bfloat16")
    whole = jax.jit(lambda *args: results(lambda q, k, v: attend(IMPLEMENTATIONS["dense"], q, k, v, Mask()), *args))
    exact = whole(*(x.astype(jnp.float32) for x in plain))
    program, placed = compiled(strategy, mesh, Mask(), TokenIndices(), plain, "dense")
    for ours, float32 in zip(program(*(jax.device_put(x, placed) for x in plain)), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(ours), float32, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_policy_that_keeps_output_and_statistics_does_not_recompute_attention(strategy):
    """A memory policy can keep `attn_out` and `attn_lse` of the sharded map."""
    mesh = mesh_of(seq=2)
    attention = sequence_parallel(IMPLEMENTATIONS["dense"], strategy=strategy, mesh=mesh)

    def products(*names):
        def block(x, scale):
            return jnp.sin(attention(x * scale, x, x, Mask(), TokenIndices())), None

        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layers = jnp.arange(2.0)
        loss = lambda x: jnp.sum(jax.lax.scan(jax.checkpoint(block, policy=policy), x, layers)[0])
        text = jax.jit(jax.grad(loss)).lower(jnp.ones((1, 16, 2, 4))).compile().as_text()
        return text.count(" dot(")

    assert products("attn_out", "attn_lse") < products()


@pytest.mark.parametrize("strategy", ["all-gather", "ulysses"])  # a permutation inside of a branch would deadlock
def test_it_can_be_differentiated_inside_a_branch_of_a_pipeline(strategy):
    """Two different stages, one on each device: `switch` inside a map over `pipe`."""
    mesh, plain = mesh_of(pipe=2, seq=2), [jnp.stack([x, x[::-1]]) for x in arrays(4)[:3]]
    cut = sequence_parallel(IMPLEMENTATIONS["dense"], strategy=strategy, mesh=mesh)
    whole = lambda *qkv: attend(IMPLEMENTATIONS["dense"], *qkv, Mask())

    def stage(*qkv):
        branches = [lambda *qkv: cut(*qkv, Mask(), TokenIndices()), lambda *qkv: 3 * cut(*qkv, Mask(), TokenIndices())]
        return jax.lax.switch(jax.lax.axis_index("pipe"), branches, *(x[0] for x in qkv))[None]

    spec = PartitionSpec("pipe")
    stages = jax.shard_map(stage, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"pipe"})
    gradient = jax.grad(lambda qkv: jnp.sum(jnp.sin(stages(*qkv))))
    expected = jax.grad(
        lambda qkv: sum(jnp.sum(jnp.sin(n * whole(*(x[at] for x in qkv)))) for at, n in ((0, 1), (1, 3)))
    )
    for ours, exact in zip(jax.jit(gradient)(plain), jax.jit(expected)(plain), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=2e-5)


def test_ulysses_refuses_fewer_key_heads_than_devices():
    plain = arrays(2)
    with pytest.raises(UserError, match=r"sequence\.parallel: ulysses .*mesh\.seq = 4 .*the 2 key-value heads"):
        compiled("ulysses", mesh_of(seq=4), Mask(), TokenIndices(), plain)


@pytest.mark.parametrize("strategy", ["all-gather", "ring"])
def test_an_implementation_that_needs_plain_order_is_refused(strategy):
    with pytest.raises(UserError, match=r"model\.attention: cudnn needs tokens in plain order"):
        compiled(strategy, mesh_of(seq=2), Mask(), TokenIndices(), arrays(8, "bfloat16"), "cudnn")


def test_unknown_strategies_and_uneven_shards_are_errors():
    with pytest.raises(UserError, match=r"rings matches nothing; there are all-gather, ring, ulysses"):
        sequence_parallel(IMPLEMENTATIONS["dense"], strategy="rings", mesh=mesh_of(seq=2))
    with pytest.raises(UserError, match=r"mesh\.seq: 8, .* 12 queries"):
        compiled("ring", mesh_of(seq=8), Mask(), TokenIndices(), [x[:, :12] for x in arrays(8)])
