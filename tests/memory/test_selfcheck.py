"""A device that offloads wrongly is refused before it trains."""

import jax
import pytest

from equivalence import tiny
from meshwright.configs.errors import MeshwrightError
from meshwright.memory.policy import rematerialized
from meshwright.memory.selfcheck import check_offload

OFFLOAD = {"block_in": "offload", "q": "keep"}
COMPUTE = {"platform": "gpu", "compute": "float32"}


def broken(chosen, *, scanned):
    """A compiler that forgets the first token of what it fetches from the host: the values of a block stay right."""

    def wrap(block):
        if chosen is None:
            return block

        @jax.custom_vjp
        def faulty(weights, x):
            return block(weights, x)

        def forward(weights, x):
            return block(weights, x), (weights, x)

        def backward(saved, cotangent):
            weights, x = saved
            return jax.vjp(block, weights, x.at[:, 0].set(0))[1](cotangent)

        faulty.defvjp(forward, backward)
        return faulty

    return wrap


def test_right_gradients_pass():
    check_offload(tiny().model, OFFLOAD, **COMPUTE)


def test_wrong_gradients_are_refused_by_name():
    with pytest.raises(MeshwrightError, match=r"offloading block_in gives wrong gradients .*#46231"):
        check_offload(tiny().model, OFFLOAD, **COMPUTE, remat=broken)


@pytest.mark.parametrize(("chosen", "platform"), [(OFFLOAD, "cpu"), ({"q": "keep"}, "gpu"), (None, "gpu")])
def test_nothing_runs_where_nothing_is_offloaded(chosen, platform):
    def never(chosen, *, scanned):
        raise RuntimeError(f"ran with {chosen}")

    check_offload(tiny().model, chosen, platform=platform, compute="float32", remat=never)


@pytest.mark.gpu
def test_this_gpu_offloads_rightly():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU")
    check_offload(tiny().model, OFFLOAD, platform="gpu", compute="bfloat16", remat=rematerialized)
