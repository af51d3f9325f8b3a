"""The sharded vocabulary: never gathered, neither table nor logits, and the same numbers as a plain softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from support.equivalence import tiny

from meshwright.configs.sections.parallel import MeshConfig
from meshwright.parallel.hlo import collectives as hlo
from meshwright.parallel.mesh import make_mesh
from meshwright.parallel.sharding import ACTIVATION_RULES, WEIGHT_RULES, constrainer, partition_spec
from meshwright.parallel.vocabulary import compute_logits, embedding_lookup, token_logprobs
from meshwright.train.engine.program import build

BATCH, SEQUENCE, EMBED, ROWS = 8, 16, 8, 1024  # one device's columns of the logits weigh more than all hidden states
MESHES = {
    "tensor 2": {"tensor": 2},
    "tensor 4": {"tensor": 4},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp x seq x tensor": {"fsdp": 2, "seq": 2, "tensor": 2},
}


def mesh_of(axes):
    return make_mesh(MeshConfig(**axes, platform="cpu"))


def shaped(shape, names, *, mesh, rules, dtype=jnp.float32):
    sharding = NamedSharding(mesh, partition_spec(names, shape=shape, mesh=mesh, rules=rules))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def arguments(mesh, *, kernel):
    """Shapes of hidden states or their weights, tokens or targets, and the table, as a step has them."""
    hidden = shaped((BATCH, SEQUENCE, EMBED), ("batch", "block_sequence", None), mesh=mesh, rules=ACTIVATION_RULES)
    tokens = shaped((BATCH, SEQUENCE), ("batch", "sequence"), mesh=mesh, rules=ACTIVATION_RULES, dtype=jnp.int32)
    names = ("embed", "vocab") if kernel else ("vocab", "embed")
    table = shaped((EMBED, ROWS) if kernel else (ROWS, EMBED), names, mesh=mesh, rules=WEIGHT_RULES)
    return table, hidden, tokens


def values(shapes, *, vocab=ROWS):
    random = np.random.default_rng(0)
    table, hidden, _ = (random.standard_normal(shape.shape).astype(np.float32) for shape in shapes)
    return table, hidden, random.integers(0, vocab, (BATCH, SEQUENCE), dtype=np.int32)


def compiled(f, mesh, shapes, **jit):
    with jax.set_mesh(mesh):
        return jax.jit(f, **jit).lower(*shapes).compile()


def lookup_gradient(mesh):
    def loss(table, weights, tokens):
        rows = constrainer(mesh)(
            embedding_lookup(table, tokens, constrain=constrainer(mesh)), ("batch", "block_sequence", None)
        )
        return (rows * weights).sum()

    return jax.value_and_grad(loss)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_a_lookup_never_gathers_the_table_or_its_gradient(axes):
    mesh = mesh_of(axes)
    shapes = arguments(mesh, kernel=False)
    program = compiled(lookup_gradient(mesh), mesh, shapes, out_shardings=(None, shapes[0].sharding))
    crossing = [op for op in hlo.collectives(program.as_text(), mesh) if "tensor" in op.axes]
    assert 0 < max(op.bytes for op in crossing) <= BATCH * SEQUENCE * EMBED * 4, crossing
    table, weights, tokens = values(shapes)
    loss, gradient = program(*jax.device_put((table, weights, tokens), tuple(shape.sharding for shape in shapes)))
    np.testing.assert_allclose(loss, (table[tokens] * weights).sum(), rtol=1e-4)
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, weights)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def loss_of(mesh, *, vocab=ROWS, softcap=None, chunks=1):
    constrain = (lambda x, names: x) if mesh is None else constrainer(mesh)

    def loss(kernel, hidden, targets):
        logprobs = token_logprobs(
            hidden, kernel, targets, vocab=vocab, softcap=softcap, chunks=chunks, constrain=constrain
        )
        return (logprobs * jnp.arange(SEQUENCE)).sum(), logprobs

    return loss


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_logits_and_the_kernel_are_never_gathered(axes):
    """Hidden states cross `tensor`, and three numbers a token; forward and backward."""
    mesh = mesh_of(axes)
    shapes = arguments(mesh, kernel=True)
    gradient = jax.value_and_grad(loss_of(mesh, chunks=2), argnums=(0, 1), has_aux=True)
    program = compiled(gradient, mesh, shapes, out_shardings=(None, tuple(shape.sharding for shape in shapes[:2])))
    crossing = [op for op in hlo.collectives(program.as_text(), mesh) if "tensor" in op.axes]
    assert 0 < max(op.bytes for op in crossing) <= BATCH * SEQUENCE * EMBED * 4, crossing


@pytest.mark.parametrize("chunks", [1, 4])
def test_the_kernel_is_gathered_and_its_gradient_reduced_once_however_many_chunks(chunks):
    mesh = mesh_of({"data": 2, "fsdp": 2, "seq": 2})
    shapes = arguments(mesh, kernel=True)
    gradient = jax.value_and_grad(loss_of(mesh, chunks=chunks), argnums=(0, 1), has_aux=True)
    program = compiled(gradient, mesh, shapes, out_shardings=(None, tuple(shape.sharding for shape in shapes[:2])))
    large = [op for op in hlo.collectives(program.as_text(), mesh) if op.bytes >= EMBED * ROWS * 4 // 2]
    assert {op.count for op in large} == {1}, large
    assert [op.kind for op in large].count("all-gather") == 1


def test_a_sharded_sequence_communicates_only_in_the_final_sum():
    mesh = mesh_of({"seq": 2})
    shapes = arguments(mesh, kernel=True)
    program = compiled(lambda *a: loss_of(mesh, chunks=4)(*a)[0], mesh, shapes)
    assert hlo.bytes_by_axes(hlo.collectives(program.as_text(), mesh)) == {"all-reduce": {"seq": 4}}


def reference(kernel, hidden, targets, *, vocab, softcap):
    """log-softmax over the first `vocab` columns, in float64."""
    scores = hidden.astype(np.float64) @ kernel[:, :vocab].astype(np.float64)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return np.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]


CASES = {
    "plain": {},
    "padded": {"vocab": 1000},
    "softcap": {"softcap": 3.0},
    "padded, softcap, chunks": {"vocab": 1000, "softcap": 3.0, "chunks": 4},
    "sharded": {"axes": {"data": 2, "fsdp": 2, "tensor": 2}, "vocab": 1000, "chunks": 4},
    "sharded sequence": {"axes": {"fsdp": 2, "seq": 2, "tensor": 2}, "vocab": 1000, "softcap": 3.0, "chunks": 2},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_log_probabilities_are_those_of_a_plain_softmax(case):
    """And padding takes no probability and no gradient."""
    case = {"vocab": ROWS, "softcap": None, "chunks": 1, "axes": {}} | case
    mesh = mesh_of(case.pop("axes"))
    shapes = arguments(mesh, kernel=True)
    kernel, hidden, targets = values(shapes, vocab=case["vocab"])
    arrays = jax.device_put((kernel, hidden, targets), tuple(shape.sharding for shape in shapes))
    with jax.set_mesh(mesh):
        gradient, logprobs = jax.jit(jax.grad(loss_of(mesh, **case), has_aux=True))(*arrays)
    del case["chunks"]
    np.testing.assert_allclose(logprobs, reference(kernel, hidden, targets, **case), atol=2e-5)
    gradient = np.asarray(gradient)
    assert not gradient[:, case["vocab"] :].any()
    assert np.abs(gradient[:, : case["vocab"]]).max() > 1


def test_chunks_change_no_gradient_and_save_memory():
    shapes = arguments(mesh_of({}), kernel=True)
    arrays = values(shapes)
    whole, cut = (
        jax.jit(jax.grad(lambda *a, chunks=chunks: loss_of(None, chunks=chunks)(*a)[0], argnums=(0, 1)))
        .lower(*arrays)
        .compile()
        for chunks in (1, 8)
    )
    for op, other in zip(whole(*arrays), cut(*arrays), strict=True):
        np.testing.assert_allclose(op, other, atol=1e-4)
    temporaries = [each.memory_analysis().temp_size_in_bytes for each in (cut, whole)]
    assert temporaries[0] < temporaries[1] / 3, temporaries


def test_padding_has_no_probability():
    hidden, kernel = jnp.ones((1, 2, EMBED)), jnp.ones((EMBED, 16))
    scores = compute_logits(hidden, kernel, vocab=13, softcap=None, constrain=lambda x, names: x)
    assert np.isneginf(scores[..., 13:]).all() and np.isfinite(scores[..., :13]).all()


def test_a_whole_step_never_gathers_the_vocabulary():
    """With tied embeddings, so that one table is at both ends."""
    config = tiny(mesh={"tensor": 2}, model={"vocab": 4096, "tied_embeddings": True})
    program = build(config, make_mesh(config.mesh))
    logprobs = hlo.collectives(program.compiled_step().as_text(), program.mesh)
    table = 4096 * 16 * 4
    assert max(op.bytes for op in logprobs) < table / 4, max(logprobs, key=lambda op: op.bytes)
