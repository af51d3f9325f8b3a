"""A device that gives wrong gradients with offload is refused before training."""

import functools

import jax
import pytest
from support.equivalence import tiny

from meshwright.configs.errors import MeshwrightError
from meshwright.memory.offload_check import check_offload, scanned_gradient
from meshwright.train.engine.pipeline.pool_offload_check import pooled_gradient

OFFLOAD = {"block_in": "offload", "q": "keep"}
GRADIENTS = {"scanned": scanned_gradient, "in a pipeline's pools": pooled_gradient}


def broken_remat(decisions, *, scanned):
    """Like a compiler that loses the gradient of the first token, while the values of a block stay right."""

    @jax.custom_vjp
    def fetched(x):
        return x

    fetched.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent.at[:, 0].set(0),))
    return lambda block: block if decisions is None else lambda weights, x: block(weights, fetched(x))


@pytest.fixture(params=GRADIENTS.values(), ids=GRADIENTS)
def gradient(request):
    return request.param


def test_right_gradients_pass(gradient):
    check_offload(tiny().model, OFFLOAD, platform="gpu", gradient=functools.partial(gradient, compute="float32"))


def test_wrong_gradients_are_refused_by_name(gradient):
    wrong = functools.partial(gradient, compute="float32", remat=broken_remat)
    with pytest.raises(MeshwrightError, match=r"offloading block_in .*#46231"):
        check_offload(tiny().model, OFFLOAD, platform="gpu", gradient=wrong)


@pytest.mark.parametrize(("decisions", "platform"), [(OFFLOAD, "cpu"), ({"q": "keep"}, "gpu"), (None, "gpu")])
def test_nothing_is_computed_if_nothing_is_offloaded(decisions, platform):
    def never(model, decisions):
        raise RuntimeError(f"ran with {decisions}")

    check_offload(tiny().model, decisions, platform=platform, gradient=never)


@pytest.mark.gpu
def test_this_gpu_gives_right_gradients_with_offload(gradient):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    check_offload(tiny().model, OFFLOAD, platform="gpu", gradient=functools.partial(gradient, compute="bfloat16"))
