"""Wire formats: values on the grid survive bit for bit, others are rounded, and sizes are those predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.configs.sections.outer import Wire
from meshwright.parallel.outer.wire_formats import WIRE_FORMATS, round_trip
from meshwright.parallel.outer.wire_sizes import FORMAT_BITS, coded_bytes

# Half the gap between neighbours on the grid, over the block's largest magnitude, or (bf16) over the value.
LARGEST_ERROR = {"float32": 0.0, "bf16": 2**-8, "fp8": 2**-4, "int8": 0.5 / 127, "e3m0": 0.25}

wires = pytest.mark.parametrize("name", WIRE_FORMATS)
ROUND_TRIP = {name: jax.jit(lambda x, wire=wire: round_trip(wire, x)) for name, wire in WIRE_FORMATS.items()}


def arrays(seed, shape, exponent):
    random = np.random.default_rng(seed)
    return (random.normal(size=shape) * 10.0 ** (exponent + random.integers(-3, 3, shape))).astype(np.float32)


def test_every_format_of_the_configuration_exists():
    assert set(WIRE_FORMATS) == set(FORMAT_BITS) == set(Wire.__args__)


@wires
@given(seed=st.integers(0, 2**32), length=st.sampled_from([1, 7, 64, 100]), exponent=st.integers(-25, 25))
@settings(max_examples=60, deadline=None)
def test_values_on_the_grid_survive_bit_for_bit(name, seed, length, exponent):
    once = np.asarray(ROUND_TRIP[name](arrays(seed, (3, length), exponent)))
    np.testing.assert_array_equal(np.asarray(ROUND_TRIP[name](once)), once)


@wires
@given(seed=st.integers(0, 2**32), exponent=st.integers(-20, 20))
@settings(max_examples=60, deadline=None)
def test_every_value_is_rounded_by_at_most_half_a_gap(name, seed, exponent):
    x = arrays(seed, (4, 64), exponent)
    scale = np.abs(x) if name == "bf16" else np.abs(x).max(axis=-1, keepdims=True)
    error = np.abs(np.asarray(ROUND_TRIP[name](x)) - x) / scale
    assert error.max() <= LARGEST_ERROR[name] * 1.001


def test_e3m0_rounds_to_the_nearest_of_its_fifteen_values():
    """Magnitudes 0 and 2^-6 .. 1 of the largest; 0.8 is nearer to 1, 0.7 to 0.5, and 0.007 to 0."""
    x = jnp.array([[1.0, -0.5, 0.8, 0.7, -0.7, 2**-6, 0.007, -1.0]])
    assert ROUND_TRIP["e3m0"](x).tolist() == [[1.0, -0.5, 1.0, 0.5, -0.5, 2**-6, 0.0, -1.0]]


@wires
def test_zeros_scalars_and_subnormal_values_survive(name):
    assert ROUND_TRIP[name](jnp.zeros((2, 3))).tolist() == [[0.0] * 3] * 2
    assert float(ROUND_TRIP[name](jnp.float32(0.5))) == 0.5
    tiny = np.full((1, 4), 1e-42, np.float32)  # subnormal: flushed, not infinite
    assert np.isfinite(np.asarray(ROUND_TRIP[name](tiny))).all()


@wires
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 192), (4, 7), (2, 100), (3, 130), (5, 1)])
def test_predicted_bytes_are_those_of_the_coded_arrays(name, shape):
    coded = jax.eval_shape(WIRE_FORMATS[name].encode, jax.ShapeDtypeStruct(shape, jnp.float32))
    found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(coded))
    assert found == coded_bytes(name, shape)
