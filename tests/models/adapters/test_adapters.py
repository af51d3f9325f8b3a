"""Every linear method: starts at the model, merges into it, and computes the equations of its paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshwright.configs.errors import UserError
from meshwright.configs.sections.adapter import AdapterConfig
from meshwright.configs.sections.model import ModelConfig
from meshwright.models.adapters import attach, selection
from meshwright.models.adapters.adapted_modules import find_adapted_modules
from meshwright.models.adapters.merge import merge_adapters
from meshwright.models.adapters.registry import LINEAR_METHODS
from meshwright.models.context import Context
from meshwright.models.decoder import decoder_graphdef, initial_params

MODEL = ModelConfig(
    vocab=61, vocab_multiple=8, layers=5, embed=16, heads=4, kv_heads=2, head_dim=6, mlp=20, qkv_bias=True,
    windows=[4, None],
)  # fmt: skip
SMALL = MODEL.model_copy(update={"layers": 3, "windows": (None,)})
CASES = [(name, start) for name, method in LINEAR_METHODS.items() for start in method.initializers]
PATTERNS = {"rank": 6, "ranks": {"layers/[01]/*": 2, "o": 4}, "alphas": {"q": 3.0}, "rank_stabilized": True}
MORE = {"lora": PATTERNS, "dora": PATTERNS, "adalora": {"rank": 9, "alpha": 6.0}, "oft": {"block": 4}}
TOKENS = jnp.arange(24).reshape(2, 12)


def settings(method, start="zero", **more):
    return AdapterConfig(method=method, start=start, **more)


@pytest.fixture(scope="module")
def weights():
    random = np.random.default_rng(0)
    initial = jax.jit(lambda: initial_params(SMALL, jax.random.key(0)))()
    return jax.tree.map(lambda leaf: leaf + 0.1 * random.normal(size=leaf.shape).astype(np.float32), initial)


def hidden(adapter, tree):
    """The input of the head."""
    decoder = nnx.merge(decoder_graphdef(SMALL, attach.adapter_inserter(SMALL, adapter)), tree)
    return decoder.hidden(TOKENS, Context(positions=jnp.broadcast_to(jnp.arange(12), (2, 12))))[0]


def perturb_trained(tree, adapter):
    """The tree with every trained leaf changed."""
    params, frozen = attach.split_trained(tree, SMALL, adapter)
    random = np.random.default_rng(1)
    leaves = {path: leaf + 0.3 * random.normal(size=leaf.shape) for path, leaf in attach.flatten(params).items()}
    return attach.unflatten(leaves | attach.flatten(frozen))


def assert_close(one, other, tolerance=2e-5):
    np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0)


@pytest.mark.parametrize(("method", "start"), CASES)
def test_an_untrained_adapter_changes_nothing_and_a_merged_one_computes_the_same(method, start, weights):
    more = MORE.get(method, {})
    targets = [f"layers/[02]/{name}" for name in ("attn/q", "attn/o", "mlp/down")]
    adapter = settings(method, start, targets=targets, **more)

    @jax.jit
    def everything(weights):
        tree = attach.init_adapters(weights, SMALL, adapter, jax.random.key(1))
        other = perturb_trained(tree, adapter)
        merged = merge_adapters(other, SMALL, adapter)
        return hidden(None, weights), hidden(adapter, tree), hidden(adapter, other), hidden(None, merged), merged

    plain, fresh, adapted, alone, merged = everything(weights)
    assert_close(fresh, plain)
    assert np.abs(adapted - plain).max() > 0.01 * np.abs(plain).max()
    assert_close(alone, adapted)
    assert jax.tree.structure(merged) == jax.tree.structure(weights)
    for one, other in zip(jax.tree.leaves(merged["segments"]), jax.tree.leaves(weights["segments"]), strict=True):
        assert_close(one[1], other[1], tolerance=1e-6)  # this layer has no adapter


def linear_of(method, start="zero", **more):
    """(adapter module, kernel, leaves) of one linear map in float64 numpy, changed from its start."""
    adapter = settings(method, start, targets=["q"], **more)
    site = find_adapted_modules(MODEL, adapter)[0]
    random = np.random.default_rng(2)
    kernels = jnp.asarray(random.normal(size=(len(site.layer_names), 16, 4, 6)), jnp.float32)
    kernel, leaves = attach.init_adapter(site, adapter, kernels, jax.random.key(3))
    leaves = {k: v if k == "scale" else v + 0.2 * random.normal(size=v.shape) for k, v in leaves.items()}
    return kernels, kernel, {name: np.asarray(leaf[0], np.float64) for name, leaf in leaves.items()}


def merge_layer_of(method, kernel, leaves):
    from meshwright.models.adapters.interface import BaseLinear

    inside = BaseLinear(jnp.asarray(kernel, jnp.float32), None, 1)
    return (
        LINEAR_METHODS[method]
        .merge({name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()}, inside)
        .kernel
    )


def test_lora_and_dora_are_the_papers_equations():
    _, kernel, leaves = linear_of("dora", rank=3, alpha=6.0)
    w = np.asarray(kernel[0], np.float64).reshape(16, 24)
    v = w + 2.0 * leaves["a"] @ leaves["b"].reshape(3, 24)
    assert_close(merge_layer_of("lora", kernel[0], leaves).reshape(16, 24), v)
    expected = leaves["magnitude"].reshape(24) * v / np.linalg.norm(v, axis=0)
    assert_close(merge_layer_of("dora", kernel[0], leaves).reshape(16, 24), expected)


def test_pissa_subtracts_the_best_approximation():
    """The rest of the kernel has the singular values that were not subtracted."""
    original, rest, _ = linear_of("lora", "pissa", rank=3, alpha=6.0)
    before, after = (np.linalg.svd(np.asarray(x[0]).reshape(16, 24), compute_uv=False) for x in (original, rest))
    np.testing.assert_allclose(after[:13], before[3:], rtol=1e-4)
    np.testing.assert_allclose(after[13:], 0, atol=1e-5)


def test_no_gradient_flows_through_the_norm_of_dora():
    """Section 4.3: the gradient by A is that of g x A B with g a constant."""
    _, kernel, leaves = linear_of("dora", rank=3)
    leaves = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()}
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 5, 16)), jnp.float32)
    ctx = Context(positions=jnp.zeros((1, 5), jnp.int32))
    from meshwright.models.adapters.interface import BaseLinear
    from meshwright.models.adapters.lora import low_rank_update, magnitude_over_norm

    inside = BaseLinear(kernel[0], None, 1)
    fixed = magnitude_over_norm(leaves, kernel[0], 1)

    def constant(a):
        return jnp.sum(jnp.sin(fixed * (inside.multiply(x, ctx) + low_rank_update(leaves | {"a": a}, x, inside, ctx))))

    def own(a):
        return jnp.sum(jnp.sin(LINEAR_METHODS["dora"].apply(leaves | {"a": a}, x, inside, ctx)))

    assert_close(jax.grad(own)(leaves["a"]), jax.grad(constant)(leaves["a"]))


def test_ranks_and_scales_by_pattern():
    modules = {
        site.path: site for site in find_adapted_modules(MODEL, settings("lora", targets=["q", "o"], **PATTERNS))
    }
    first = modules["segments/0/0/block/attn/q"]  # layers 0 and 2
    assert first.ranks == (2, 6) and first.scales == (3 / 2**0.5, 3 / 6**0.5)
    assert first.scale[0].tolist() == [pytest.approx(3 / 2**0.5)] * 2 + [0] * 4
    assert modules["segments/1/0/block/attn/o"].ranks == (4,) and len(modules) == 6


def test_the_trained_leaves_are_those_of_the_method():
    """LoRA-FA trains the second factors; bitfit the biases; a pattern over layers masks the others of their stack."""

    def paths(adapter):
        shapes = jax.eval_shape(
            lambda: attach.init_adapters(initial_params(MODEL, jax.random.key(0)), MODEL, adapter, jax.random.key(1))
        )
        return attach.flatten(attach.split_trained(shapes, MODEL, adapter)[0])

    assert {path.rpartition("/")[2] for path in paths(settings("lora", freeze_a=True))} == {"b"}
    assert {path.rpartition("/")[2] for path in paths(settings("bitfit"))} == {"bias"}
    assert len(paths(settings("norms"))) == 3 * 2 + 1
    last = settings("selective", targets=["layers/[34]/*", "final_norm/scale"])
    assert all("/1/0/" in path or "/0/1/" in path or path == "final_norm/scale" for path in paths(last))
    change = selection.update_scaler(MODEL, last)
    scaled = change("segments/0/1/block/mlp/up/kernel", jnp.ones((2, 3, 4)))  # layers 1 and 3
    assert scaled[0].max() == 0 and scaled[1].min() == 1


MISTAKES = {
    "no such module": ({"targets": ["qv"]}, r"adapter.targets: qv matches nothing; there are attn/k, attn/o"),
    "no such layer": ({"targets": ["layers/9/*"]}, "layers/9/.* matches nothing"),
    "a rank for none": ({"targets": ["q"], "ranks": {"k": 2}}, r"adapter.ranks: k matches nothing; there are attn/q"),
    "no such weight": ({"method": "selective", "targets": ["head/bias"]}, "head/bias matches nothing"),
}


@pytest.mark.parametrize(("given", "words"), MISTAKES.values(), ids=MISTAKES)
def test_a_pattern_that_matches_nothing_lists_what_there_is(given, words):
    adapter = AdapterConfig(**given)
    with pytest.raises(UserError, match=words):
        tree = attach.init_adapters(initial_params(MODEL, jax.random.key(0)), MODEL, adapter, jax.random.key(1))
        attach.split_trained(tree, MODEL, adapter)


def test_a_key_the_method_does_not_read_is_refused():
    with pytest.raises(ValueError, match=r"adapter.ratio: 4.0 .*ia3; .* lora or dora"):
        AdapterConfig(method="ia3", ratio=4.0)
    with pytest.raises(UserError, match=r"adapter.method: bitfit .*/bias"):
        plain = MODEL.model_copy(update={"qkv_bias": False})
        attach.split_trained(initial_params(plain, jax.random.key(0)), plain, settings("bitfit"))
