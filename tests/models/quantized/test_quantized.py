"""Formats of quantized kernels: codes equal those of bitsandbytes, weights become the nearest level."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from meshwright.models.quantized import double_quantization, nf4
from meshwright.models.quantized.bit_packing import PACKS, pack_codes, unpack_codes
from meshwright.models.quantized.kernel import KernelLayout, dequantize_kernel, quantize_kernel
from meshwright.models.quantized.registry import FORMATS

THEIRS = load_file(Path(__file__).parent / "bitsandbytes.safetensors")  # made by bitsandbytes 0.50.2 of `weight()`


def weight():
    """The weight [outputs, inputs] whose codes are in the file: products of integers, exact on every machine."""
    random = np.random.default_rng(0)
    factors = [random.integers(-2000, 2001, (192, 128)) for _ in range(2)]
    return (factors[0] * factors[1]).astype(np.float32) * np.float32(2.0**-26)


def quantize_ours(*, twice):
    form = KernelLayout("nf4", 64, twice, (128,), (192,))
    leaves = jax.jit(lambda kernel: quantize_kernel(kernel, form))(weight().T)
    return leaves, dequantize_kernel(leaves, form)


def test_nf4_equals_that_of_bitsandbytes():
    leaves, kernel = quantize_ours(twice=False)
    np.testing.assert_array_equal(leaves["codes"].T, THEIRS["codes"])
    np.testing.assert_array_equal(leaves["scale"].T, THEIRS["absmax"])
    np.testing.assert_array_equal(nf4.LEVELS, THEIRS["code"])
    np.testing.assert_array_equal(kernel.T[:4], THEIRS["plain"])


def test_double_quantization_equals_that_of_bitsandbytes():
    leaves, kernel = quantize_ours(twice=True)
    np.testing.assert_array_equal(double_quantization.LEVELS, THEIRS["map"])
    np.testing.assert_array_equal(leaves["codes"].T, THEIRS["codes"])
    np.testing.assert_array_equal(leaves["scale"].T, THEIRS["absmax_codes"])
    np.testing.assert_allclose(leaves["scale_largest"], THEIRS["nested_absmax"], rtol=1e-6)
    np.testing.assert_allclose(leaves["scale_mean"], THEIRS["offset"][0], rtol=1e-6)
    np.testing.assert_allclose(kernel.T[:4], THEIRS["double"], rtol=1e-6)


@pytest.mark.parametrize("bits", PACKS)
def test_packed_codes_unpack_equal_and_use_no_extra_bytes(bits):
    codes = np.random.default_rng(1).integers(0, 2**bits, (24, 5)).astype(np.uint8)
    packs = pack_codes(jnp.asarray(codes), bits=bits)
    assert packs.shape == (24 * bits // 8, 5)
    np.testing.assert_array_equal(unpack_codes(packs, bits=bits), codes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_becomes_the_nearest_level_of_its_group(name):
    """Against a search over all levels, which are those of every code of the group."""
    kind = FORMATS[name]
    groups = jnp.asarray(np.random.default_rng(2).normal(size=(3, 16, 7)), jnp.float32)
    groups = groups.at[0].set(jnp.abs(groups[0])).at[1, :, 3].set(0)
    codes, statistics = kind.encode(groups)
    every = jnp.arange(2**kind.bits, dtype=jnp.uint8)
    levels = kind.decode(jnp.broadcast_to(every[:, None], (3, 2**kind.bits, 7)), statistics)  # [groups, codes, outputs]
    best = jnp.min(jnp.abs(groups[:, :, None] - levels[:, None]), axis=2)
    actual = jnp.abs(kind.decode(codes, statistics) - groups)
    np.testing.assert_allclose(actual, best, atol=1e-6)
    assert actual[1, :, 3].max() == 0 and codes.max() == 2**kind.bits - 1


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("inputs", "outputs"), [((32,), (3, 4)), ((4, 8), (6,))])
def test_more_bits_have_a_smaller_error_for_any_dimensions(name, inputs, outputs):
    form = KernelLayout(name, 16, False, inputs, outputs)
    kernel = jnp.asarray(np.random.default_rng(3).normal(size=(*inputs, *outputs)), jnp.float32)
    restored = dequantize_kernel(quantize_kernel(kernel, form), form)
    assert restored.shape == kernel.shape
    error = float(jnp.linalg.norm(restored - kernel) / jnp.linalg.norm(kernel))
    usual = {"nf4": 0.08, "int8": 0.004, "int4": 0.07, "int3": 0.15, "int2": 0.35}[name]
    assert 0.5 * usual < error < 1.5 * usual
