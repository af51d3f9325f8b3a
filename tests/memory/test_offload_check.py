"""A device that offloads wrongly is refused before it trains."""

import functools

import jax
import pytest
from support.equivalence import tiny

from meshwright.configs.errors import MeshwrightError
from meshwright.memory.offload_check import check_offload, scanned_gradient
from meshwright.train.engine.pipeline.pool_offload_check import pooled_gradient

OFFLOAD = {"block_in": "offload", "q": "keep"}
GRADIENTS = {"scanned": scanned_gradient, "in a pipeline's pools": pooled_gradient}


def broken(chosen, *, scanned):
    """A compiler that forgets the first token on the way back from the host: the values of a block stay right."""

    @jax.custom_vjp
    def fetched(x):
        return x

    fetched.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent.at[:, 0].set(0),))
    return lambda block: block if chosen is None else lambda weights, x: block(weights, fetched(x))


@pytest.fixture(params=GRADIENTS.values(), ids=GRADIENTS)
def gradient(request):
    return request.param


def test_right_gradients_pass(gradient):
    check_offload(tiny().model, OFFLOAD, platform="gpu", gradient=functools.partial(gradient, compute="float32"))


def test_wrong_gradients_are_refused_by_name(gradient):
    wrong = functools.partial(gradient, compute="float32", remat=broken)
    with pytest.raises(MeshwrightError, match=r"offloading block_in gives wrong gradients .*#46231"):
        check_offload(tiny().model, OFFLOAD, platform="gpu", gradient=wrong)


@pytest.mark.parametrize(("chosen", "platform"), [(OFFLOAD, "cpu"), ({"q": "keep"}, "gpu"), (None, "gpu")])
def test_nothing_runs_where_nothing_is_offloaded(chosen, platform):
    def never(model, chosen):
        raise RuntimeError(f"ran with {chosen}")

    check_offload(tiny().model, chosen, platform=platform, gradient=never)


@pytest.mark.gpu
def test_this_gpu_offloads_rightly(gradient):
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    check_offload(tiny().model, OFFLOAD, platform="gpu", gradient=functools.partial(gradient, compute="bfloat16"))
