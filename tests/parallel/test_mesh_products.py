"""Any product of mesh axes is the same computation as one device."""

import pytest
from support.equivalence import assert_same, tiny

from meshwright.parallel.sequence.attend import STRATEGIES

PRODUCTS = {
    "data": {"data": 2},
    "fsdp": {"fsdp": 2},
    "tensor": {"tensor": 2},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "seq, gathered": {"seq": 2},
    "seq x tensor x data": {"seq": 2, "tensor": 2, "data": 2},
}


@pytest.mark.parametrize("mesh", PRODUCTS.values(), ids=PRODUCTS)
def test_a_product_of_axes_equals_one_device(mesh):
    assert_same(tiny(), tiny(mesh=mesh))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_context_parallelism_equals_one_device(strategy):
    assert_same(tiny(), tiny(mesh={"seq": 2, "fsdp": 2, "data": 2}, sequence={"parallel": strategy}))
