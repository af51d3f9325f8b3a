"""`splash`, interpreted on this CPU: equal to `dense`, exact about documents, and explicit about what it refuses."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from meshwright.configs.errors import UserError
from meshwright.configs.loader import validate_tree
from meshwright.configs.names import MESH_AXES
from meshwright.memory.jaxpr_stats import equations
from meshwright.models.attention import splash
from meshwright.models.attention.interface import Mask, TokenIndices, attend
from meshwright.models.attention.registry import IMPLEMENTATIONS, choose
from meshwright.parallel.sequence.attend import sequence_parallel

TOKENS = 256
INTERPRETED = splash.make_splash(interpret=True)
DOCUMENTS = np.repeat(np.arange(4, dtype=np.int32), [40, 100, 61, 55])
ALIEN = np.where(np.arange(TOKENS) < 10, 7, DOCUMENTS).astype(np.int32)  # 10 queries of a document no key belongs to


class Case(NamedTuple):
    mask: Mask = Mask()
    segments: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    most_fused_blocks: int = 8


CASES = {
    "causal": Case(),
    "both-ways": Case(Mask(causal=False, scale=0.3)),
    "documents-softcap": Case(Mask(softcap=1.5), (DOCUMENTS, DOCUMENTS)),
    "unseen-document": Case(segments=(ALIEN, DOCUMENTS)),
    "grouped-window": Case(Mask(window=150), (DOCUMENTS, DOCUMENTS), heads=4, head_dim=128),
    "multi-query-in-bfloat16": Case(kv_heads=1, head_dim=128, dtype="bfloat16"),
    "dq-by-itself": Case(Mask(causal=False, window=50, softcap=2.0, scale=0.5), kv_heads=1, most_fused_blocks=1),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Two blocks along either side."""
    monkeypatch.setattr(splash, "BLOCK_SIDES", (128,))


def arrays(heads=2, kv_heads=2, head_dim=64, dtype="float32", batch=2):
    """q, k, v, d_out, with values that are exact in every dtype."""
    random = np.random.default_rng(0)
    shapes = [(batch, TOKENS, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jnp.asarray(random.normal(size=shape), jnp.bfloat16).astype(dtype) for shape in shapes]


def token_indices(query_segments, key_segments, batch=2):
    """The second row has the documents of the first in reverse."""
    rows = [None if x is None else np.stack([x, x[::-1]])[:batch] for x in (query_segments, key_segments)]
    return TokenIndices(None, None, *rows)


def results(attention, q, k, v, d_out):
    out, pull = jax.vjp(attention, q, k, v)
    return out, *pull(d_out)


def output_and_gradients(implementation, mask, indices, *args):
    """out, dq, dk, dv and lse as one compiled program."""

    def run(q, k, v, d_out):
        out, lse = implementation.forward(q, k, v, mask, indices)
        return out, *implementation.backward(q, k, v, out, lse, d_out, mask, indices), lse

    return jax.jit(run)(*args)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_interpreted_it_equals_dense(case, monkeypatch):
    monkeypatch.setattr(splash, "MOST_FUSED_BLOCKS", case.most_fused_blocks)
    args, indices = arrays(case.heads, case.kv_heads, case.head_dim, case.dtype), token_indices(*case.segments)
    actual = output_and_gradients(INTERPRETED, case.mask, indices, *args)
    exact = output_and_gradients(IMPLEMENTATIONS["dense"], case.mask, indices, *args)
    tolerance = {"float32": 2e-5, "bfloat16": 4e-2}[case.dtype]
    for name, ours, reference in zip(("out", "dq", "dk", "dv", "lse"), actual, exact, strict=True):
        assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype), name
        np.testing.assert_allclose(
            np.float32(ours), np.float32(reference), rtol=tolerance, atol=2 * tolerance, err_msg=name
        )


def test_no_bit_of_a_document_depends_on_another():
    """Other tokens in document 1 leave the output and the gradients of all others as they were."""
    indices, changed = token_indices(DOCUMENTS, DOCUMENTS, batch=1), DOCUMENTS == 1
    plain = arrays(batch=1)
    other = [jnp.where(changed[None, :, None, None], x[:, ::-1], x) for x in plain]
    run = jax.jit(lambda *args: results(lambda *qkv: attend(INTERPRETED, *qkv, Mask(), indices), *args))
    for name, before, after in zip(("out", "dq", "dk", "dv"), run(*plain), run(*other), strict=True):
        np.testing.assert_array_equal(before[:, ~changed], after[:, ~changed], err_msg=name)
        assert (np.asarray(before != after)[:, changed]).any(), f"{name} of the changed document is as before"


def mesh_of(**axes):
    sizes = tuple(axes.get(axis, 1) for axis in MESH_AXES)
    return jax.make_mesh(
        sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=jax.devices()[: np.prod(sizes)]
    )


def test_on_a_mesh_it_equals_dense_on_one_device():
    args, indices = arrays(heads=4, kv_heads=4), token_indices(DOCUMENTS, DOCUMENTS)
    mapped = sequence_parallel(INTERPRETED, strategy="ulysses", mesh=mesh_of(fsdp=2, seq=2, tensor=2))
    ours = jax.jit(lambda *args: results(lambda *qkv: mapped(*qkv, Mask(), indices), *args))(*args)
    for x, exact in zip(ours, output_and_gradients(IMPLEMENTATIONS["dense"], Mask(), indices, *args), strict=False):
        np.testing.assert_allclose(x, exact, rtol=2e-5, atol=4e-5)


def test_no_mesh_axis_is_left_to_the_partitioner_even_inside_a_pipeline():
    """Two different stages, one on each device: `switch` inside a map over `pipe`."""
    mesh, plain = mesh_of(pipe=2, data=2), [jnp.stack([x, x[::-1]]) for x in arrays(heads=1, kv_heads=1)[:3]]
    mapped = sequence_parallel(INTERPRETED, strategy="all-gather", mesh=mesh)
    whole = lambda *qkv: attend(IMPLEMENTATIONS["dense"], *qkv, Mask())

    def stage(*qkv):
        branches = [lambda *qkv, n=n: n * mapped(*qkv, Mask(), TokenIndices()) for n in (1, 3)]
        return jax.lax.switch(jax.lax.axis_index("pipe"), branches, *(x[0] for x in qkv))[None]

    spec = PartitionSpec("pipe")
    stages = jax.shard_map(stage, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={"pipe"}, check_vma=False)
    gradient = jax.jit(jax.grad(lambda qkv: jnp.sum(jnp.sin(stages(*qkv)))))
    program = jax.make_jaxpr(gradient)(plain)
    manual = [
        set(eqn.params["newly_manual_axes"]) for eqn, _ in equations(program) if eqn.primitive.name == "shard_map"
    ]
    inner = [axes for axes in manual if axes != {"pipe"}]
    assert inner and all(axes == set(MESH_AXES) - {"pipe"} for axes in inner)
    expected = jax.grad(
        lambda qkv: sum(jnp.sum(jnp.sin(n * whole(*(x[at] for x in qkv)))) for at, n in ((0, 1), (1, 3)))
    )
    for ours, exact in zip(gradient(plain), jax.jit(expected)(plain), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=2e-5, atol=4e-5)


def sizes(queries=TOKENS, keys=TOKENS, head_dim=64, dtype=jnp.bfloat16):
    q = jax.ShapeDtypeStruct((2, queries, 4, head_dim), dtype)
    return q, jax.ShapeDtypeStruct((2, keys, 2, head_dim), dtype)


INDEX = jnp.arange(TOKENS)
REFUSED = {
    "indices": (TokenIndices(INDEX, INDEX), {}, "plain order"),
    "fewer-queries": (TokenIndices(), {"queries": 128}, "not 128 and 256"),
    "length": (TokenIndices(), {"queries": 200, "keys": 200}, "multiples of 128 tokens, not 200"),
    "head_dim": (TokenIndices(), {"head_dim": 20}, "not 20"),
    "wide-head": (TokenIndices(), {"head_dim": 512}, "not 512"),
    "float16": (TokenIndices(), {"dtype": jnp.float16}, "not float16"),
}


@pytest.mark.parametrize("indices, shape, reason", REFUSED.values(), ids=REFUSED)
def test_by_name_it_is_refused_where_it_cannot_compute_and_auto_uses_blockwise(indices, shape, reason):
    q, k = sizes(**shape)
    with pytest.raises(UserError, match=rf"model\.attention: splash .*{reason}.*use blockwise"):
        choose("splash", mask=Mask(), indices=indices, q=q, k=k, platform="tpu")
    assert choose("auto", mask=Mask(), indices=indices, q=q, k=k, platform="tpu").name == "blockwise"


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_it_runs_on_tpus_only(platform):
    q, k = sizes()
    with pytest.raises(UserError, match=f"splash runs on TPUs, not on {platform}"):
        choose("splash", mask=Mask(), indices=TokenIndices(), q=q, k=k, platform=platform)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_a_configuration_for_other_devices_is_refused(platform):
    with pytest.raises(UserError, match=f"model.attention: splash needs a TPU, but mesh.platform is {platform}; use"):
        validate_tree({"model": {"attention": "splash"}, "mesh": {"platform": platform}})


@pytest.mark.parametrize("mask", [Mask(), Mask(window=4, softcap=2.0), Mask(causal=False, scale=0.3)])
def test_auto_on_a_tpu_uses_it_for_all_it_can_do(mask):
    q, k = sizes()
    assert choose("auto", mask=mask, indices=token_indices(DOCUMENTS, DOCUMENTS), q=q, k=k, platform="tpu").name == (
        "splash"
    )


def test_another_version_of_the_private_function_is_refused_by_name(monkeypatch):
    module = splash._library()[0]
    monkeypatch.setattr(splash, "_unavailable", splash._unavailable.__wrapped__)  # without its cache
    monkeypatch.setattr(module, "_splash_attention_bwd", lambda residuals, d_out: None)
    reason = splash.SPLASH.refuse(Mask(), TokenIndices(), *sizes(), "tpu")
    assert jax.__version__ in reason and "residuals, d_out" in reason
    monkeypatch.delattr(module, "_splash_attention_bwd")
    assert jax.__version__ in splash.SPLASH.refuse(Mask(), TokenIndices(), *sizes(), "tpu")


def test_the_largest_block_that_fits_is_used(monkeypatch):
    monkeypatch.undo()
    assert [splash.block_side(tokens, 256) for tokens in (2048, 1536, 256, 384)] == [1024, 512, 256, 128]
    assert splash.block_side(2048, 512) == 512
