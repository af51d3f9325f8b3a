"""Quantized kernels put into a model: into its structure, into what is frozen, and made whole again.

graph(model, put(model, quantization, trained))         the structure, with leaves in the place of kernels
frozen = quantized(frozen, model, quantization)         every kernel of the blocks that is there
tree = dequantized(tree, model, dtype=...)              the plain parameters that compute the same
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
from .adapters.attach import CUT_BY_TENSOR, copy_dicts, subtree
from .decoder import Decoder, Params
from .logical_axes import axis_names
from .quantized.kernel import KernelLayout, QuantizedKernel, dequantize_kernel, quantize_kernel


def kernel_layouts(model: ModelConfig, quantization: QuantizationConfig) -> Iterator[tuple[str, KernelLayout]]:
    """(path of the kernel in the run, what its leaves mean) of every stack of linear maps."""
    for path, _ in layer_stacks(model):
        for name, (inputs, outputs) in linear_maps(model).items():
            names = axis_names(f"{path}/{name}/kernel")
            cut = tuple(axis if axis in CUT_BY_TENSOR else None for axis in (names[0], *names[len(inputs) :]))
            settings = (quantization.format, quantization.group, quantization.double)
            yield f"{path}/{name}/kernel", KernelLayout(*settings, inputs, outputs, cut)


def quantized_kernel_inserter(
    model: ModelConfig, quantization: QuantizationConfig | None, frozen: Any
) -> Callable[[Decoder], None]:
    """A function that puts leaves of zeros into a decoder, where `frozen` (shapes) has quantized kernels."""

    def into(decoder: Decoder) -> None:
        for path, form in [] if quantization is None else kernel_layouts(model, quantization):
            if isinstance(leaves := find_subtree(frozen, path), dict):
                _, segment, place, _, part, name, _ = path.split("/")
                zeros = {leaf: jnp.zeros(like.shape, like.dtype) for leaf, like in leaves.items()}
                linear = getattr(getattr(decoder.segments[segment][place].block, part), name)
                linear.kernel = QuantizedKernel(zeros, form)

    return into


def quantize_frozen(frozen: Params, model: ModelConfig, quantization: QuantizationConfig | None) -> Params:
    """`frozen` with leaves in the place of the blocks' kernels; itself without a `quantization`. Pure.

    Raises UserError where there is no kernel, unless those that are trained are in codes too.
    """
    if quantization is None:
        return frozen
    if not quantization.trained and not any(
        find_subtree(frozen, path) is not None for path, _ in kernel_layouts(model, quantization)
    ):
        raise UserError(
            f"quantization: {quantization.format} has nothing to keep: every linear map is trained; remove it, or "
            "narrow adapter.targets"
        )
    return quantize_tree(frozen, model, quantization)


def quantize_trained(params: Params, model: ModelConfig, quantization: QuantizationConfig | None) -> Params:
    """`params` with leaves in the place of the blocks' kernels where `quantization.trained`; else themselves. Pure.

    Raises UserError where there is no kernel.
    """
    if quantization is None or not quantization.trained:
        return params
    if not any(find_subtree(params, path) is not None for path, _ in kernel_layouts(model, quantization)):
        raise UserError(
            "quantization.trained: true, but no linear map is trained; name some in adapter.targets, or set it to false"
        )
    return quantize_tree(params, model, quantization)


def quantize_tree(tree: Params, model: ModelConfig, quantization: QuantizationConfig) -> Params:
    """`tree` with leaves in the place of every kernel of the blocks that is there. Pure."""
    result = copy_dicts(tree)
    for path, form in kernel_layouts(model, quantization):
        linear, _, leaf = path.rpartition("/")
        if (kernels := find_subtree(tree, path)) is not None:
            subtree(result, linear)[leaf] = jax.vmap(partial(quantize_kernel, layout=form))(kernels)
    return result


def dequantize_tree(tree: Params, model: ModelConfig, quantization: QuantizationConfig | None, *, dtype: Any) -> Params:
    """`tree` with kernels of `dtype` in the place of their leaves. Pure."""
    if quantization is None:
        return tree
    result = copy_dicts(tree)
    for path, form in kernel_layouts(model, quantization):
        linear, _, leaf = path.rpartition("/")
        if isinstance(leaves := find_subtree(tree, path), dict):
            subtree(result, linear)[leaf] = jax.vmap(partial(dequantize_kernel, layout=form))(leaves).astype(dtype)
    return result


def make_fake_quantize(quantization: QuantizationConfig | None) -> Callable[..., jax.Array]:
    """(kernel [inputs..., outputs...], inputs, outputs) -> the kernel as it will read once it is quantized."""

    def read(kernel: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> jax.Array:
        if quantization is None:
            return kernel
        form = KernelLayout(quantization.format, quantization.group, quantization.double, inputs, outputs)
        return dequantize_kernel(quantize_kernel(kernel, form), form)

    return read


def find_subtree(tree: Params, path: str) -> Any:
    """What stands at `a/b/c`; None where nothing does."""
    for key in path.split("/"):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
