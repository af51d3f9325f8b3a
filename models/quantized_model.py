"""Quantized kernels in a model: in its structure and its parameters, and dequantized again.

decoder_graphdef(model, quantized_kernel_inserter(model, quantization, frozen))     the structure
frozen = quantize_frozen(frozen, model, quantization)                               leaves in the place of kernels
tree = dequantize_tree(tree, model, quantization, dtype=...)                        plain parameters, the same model
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..configs.errors import UserError
from ..configs.sections.model import ModelConfig
from ..configs.sections.quantization import QuantizationConfig
from .adapters.adapted_modules import layer_stacks, linear_maps
from .adapters.attach import CUT_BY_TENSOR, copy_dicts, submodule, subtree
from .decoder import Decoder, Params
from .logical_axes import axis_names
from .quantized.kernel import KernelLayout, QuantizedKernel, dequantize_kernel, quantize_kernel


def kernel_layouts(model: ModelConfig, quantization: QuantizationConfig) -> Iterator[tuple[str, KernelLayout]]:
    """(path of the kernel in the run, how to read its leaves) of every stack of linear maps."""
    for path, _ in layer_stacks(model):
        for name, (inputs, outputs) in linear_maps(model).items():
            names = axis_names(f"{path}/{name}/kernel")
            axes = tuple(axis if axis in CUT_BY_TENSOR else None for axis in (names[0], *names[len(inputs) :]))
            settings = (quantization.format, quantization.group, quantization.double)
            yield f"{path}/{name}/kernel", KernelLayout(*settings, inputs, outputs, axes)


def quantized_kernel_inserter(
    model: ModelConfig, quantization: QuantizationConfig | None, frozen: Any
) -> Callable[[Decoder], None]:
    """Make a function that inserts leaves of zeros into a decoder, where `frozen` (shapes) has quantized kernels."""

    def insert(decoder: Decoder) -> None:
        for path, layout in [] if quantization is None else kernel_layouts(model, quantization):
            if isinstance(leaves := find_subtree(frozen, path), dict):
                linear = submodule(decoder, path.removesuffix("/kernel"))
                linear.kernel = QuantizedKernel(jax.tree.map(jnp.zeros_like, leaves), layout)

    return insert


def quantize_frozen(frozen: Params, model: ModelConfig, quantization: QuantizationConfig | None) -> Params:
    """`frozen` with every kernel of the blocks quantized; unchanged without `quantization`. Pure.

    Raises UserError where there is no kernel, unless trained kernels are quantized too.
    """
    if quantization is None:
        return frozen
    if not quantization.trained and not has_kernels(frozen, model, quantization):
        raise UserError(
            f"quantization.format: {quantization.format} has nothing to quantize, because every linear map is trained; "
            "remove the section quantization, or name fewer maps in adapter.targets"
        )
    return quantize_tree(frozen, model, quantization)


def quantize_trained(params: Params, model: ModelConfig, quantization: QuantizationConfig | None) -> Params:
    """`params` with every kernel of the blocks quantized where `quantization.trained`, else unchanged. Pure.

    Raises UserError where there is no kernel.
    """
    if quantization is None or not quantization.trained:
        return params
    if not has_kernels(params, model, quantization):
        raise UserError(
            "quantization.trained: true, but no linear map is trained; name some in adapter.targets, or set it to false"
        )
    return quantize_tree(params, model, quantization)


def has_kernels(tree: Params, model: ModelConfig, quantization: QuantizationConfig) -> bool:
    """Whether `tree` has the kernel of any linear map of the blocks."""
    return any(find_subtree(tree, path) is not None for path, _ in kernel_layouts(model, quantization))


def quantize_tree(tree: Params, model: ModelConfig, quantization: QuantizationConfig) -> Params:
    """`tree` with every kernel of the blocks quantized. Pure."""
    result = copy_dicts(tree)
    for path, layout in kernel_layouts(model, quantization):
        linear, _, leaf = path.rpartition("/")
        if (kernels := find_subtree(tree, path)) is not None:
            subtree(result, linear)[leaf] = jax.vmap(partial(quantize_kernel, layout=layout))(kernels)
    return result


def dequantize_tree(tree: Params, model: ModelConfig, quantization: QuantizationConfig | None, *, dtype: Any) -> Params:
    """`tree` with kernels of `dtype` in the place of quantized ones. Pure."""
    if quantization is None:
        return tree
    result = copy_dicts(tree)
    for path, layout in kernel_layouts(model, quantization):
        linear, _, leaf = path.rpartition("/")
        if isinstance(leaves := find_subtree(tree, path), dict):
            subtree(result, linear)[leaf] = jax.vmap(partial(dequantize_kernel, layout=layout))(leaves).astype(dtype)
    return result


def make_fake_quantize(quantization: QuantizationConfig | None) -> Callable[..., jax.Array]:
    """Make (kernel [inputs..., outputs...], inputs, outputs) -> the kernel as it reads once it is quantized."""

    def fake_quantize(kernel: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> jax.Array:
        if quantization is None:
            return kernel
        layout = KernelLayout(quantization.format, quantization.group, quantization.double, inputs, outputs)
        return dequantize_kernel(quantize_kernel(kernel, layout), layout)

    return fake_quantize


def find_subtree(tree: Params, path: str) -> Any:
    """The part of the nested dicts at `a/b/c`; None where there is none."""
    for key in path.split("/"):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
