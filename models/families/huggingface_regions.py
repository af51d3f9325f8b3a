"""The region of a Hugging Face tensor that holds one of our weights: any block of a weight is one rectangle of a file.

Our kernel is [inputs..., outputs...]; the file has a matrix of flattened outputs and inputs, transposed or not, in
which fused maps follow each other along the outputs:

    attn/k/kernel [embed, kv_heads, head_dim]   =   qkv_proj.weight [q | k | v, embed], rows of k, transposed
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...configs.errors import UserError
from .huggingface_names import INPUTS_FIRST, MODULE_NAMES

Shapes = Mapping[str, tuple[int, ...]]  # canonical name -> shape
Index = tuple[slice, ...]
LAYER = re.compile(r"^layers/(\d+)/")
MATRICES = ("kernel", "embedding", "positions")
INPUT_DIMENSIONS = {"attn/o/kernel": 2}  # other matrices have one


@dataclass(frozen=True)
class TensorRegion:
    """The rectangle of a tensor in a file that holds one of our weights."""

    tensor: str
    shape: tuple[int, ...]  # of our weight
    inputs: int  # how many leading dimensions of `shape` are inputs; 0 for a vector (a bias, a norm)
    transposed: bool  # the tensor is [outputs, inputs]
    first_output: int  # output of the tensor at which our weight begins
    tensor_outputs: int  # outputs of the tensor

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the file."""
        if not self.inputs:
            return (self.tensor_outputs,)
        sides = (math.prod(self.shape[: self.inputs]), self.tensor_outputs)
        return sides[::-1] if self.transposed else sides

    def read(self, source: Callable[[Index], np.ndarray], index: Index) -> np.ndarray:
        """The block `index` (one slice a dimension) of our weight; `source` reads a rectangle of the tensor."""
        inputs, inner = flatten_index(self.shape[: self.inputs], index[: self.inputs])
        outputs, outer = flatten_index(self.shape[self.inputs :], index[self.inputs :])
        outputs = slice(self.first_output + outputs.start, self.first_output + outputs.stop)
        if not self.inputs:
            block = source((outputs,))
        else:
            block = source((outputs, inputs)).T if self.transposed else source((inputs, outputs))
        return block.reshape(*inner.shape, *outer.shape)[(*inner.index, *outer.index)]

    def to_file_layout(self, array: np.ndarray) -> np.ndarray:
        """Our weight as a block of the tensor, [inputs, outputs] or [outputs]."""
        return array.reshape(math.prod(self.shape[: self.inputs]), -1) if self.inputs else array.reshape(-1)


@dataclass(frozen=True)
class Unflatten:
    """How to unflatten a range: reshape it to `shape`, then take `index`."""

    shape: tuple[int, ...]
    index: Index


def flatten_index(shape: tuple[int, ...], index: Index) -> tuple[slice, Unflatten]:
    """The range of the flattened dimensions that holds block `index`: no more than it if only the first is sliced.

    >>> flatten_index((4, 8), (slice(1, 3), slice(0, 8)))[0]
    slice(8, 24, None)
    """
    if not shape:
        return slice(0, 1), Unflatten((), ())
    (start, stop, _), stride = index[0].indices(shape[0]), math.prod(shape[1:])
    rest = tuple(slice(*part.indices(size)) for part, size in zip(index[1:], shape[1:], strict=True))
    return slice(start * stride, stop * stride), Unflatten((stop - start, *shape[1:]), (slice(None), *rest))


def find_module(name: str, modules: Mapping[str, str]) -> tuple[str, str]:
    """(our module, its key in the table) of the weight with canonical `name`."""
    key = LAYER.sub("layers/{}/", name)
    return (name, key) if key in modules else (name.rpartition("/")[0], key.rpartition("/")[0])


def fused_modules(key: str, modules: Mapping[str, str]) -> list[str]:
    """Keys of the modules that one module of the file fuses with `key`, itself included, in order."""
    return [other for other, fused in modules.items() if fused == modules[key]]


def find_region(name: str, shapes: Shapes, *, kind: str) -> TensorRegion:
    """The region of the weight with canonical `name` in a file of format `kind`. Raises UserError where it has none."""
    modules = MODULE_NAMES[kind]
    _, key = find_module(name, modules)
    if key not in modules:
        raise UserError(f"model: a file of model_type {kind} has no tensor for {name}, so it cannot be exported")
    leaf = name.rpartition("/")[2]
    layer = match[1] if (match := LAYER.match(name)) else ""
    inputs = INPUT_DIMENSIONS.get("/".join(name.split("/")[-3:]), 1) if leaf in MATRICES else 0
    sizes = {
        other: math.prod(shapes[f"{other.format(layer)}/{leaf}"][inputs:]) if other != key else None
        for other in fused_modules(key, modules)
    }
    sizes[key] = math.prod(shapes[name][inputs:])
    order = list(sizes)
    return TensorRegion(
        tensor=f"{modules[key].format(layer)}.{'bias' if leaf == 'bias' else 'weight'}",
        shape=tuple(shapes[name]),
        inputs=inputs,
        transposed=leaf == "kernel" and (kind not in INPUTS_FIRST or name.startswith(("head/", "score/"))),
        first_output=sum(sizes[other] for other in order[: order.index(key)]),
        tensor_outputs=sum(sizes.values()),
    )


def regions_by_tensor(shapes: Shapes, *, kind: str) -> dict[str, list[tuple[str, TensorRegion]]]:
    """Every tensor of a file -> (our weight, its region), in the order of outputs. UserError as `find_region`."""
    regions: dict[str, list[tuple[str, TensorRegion]]] = {}
    for name in shapes:
        region = find_region(name, shapes, kind=kind)
        regions.setdefault(region.tensor, []).append((name, region))
    return {tensor: sorted(parts, key=lambda part: part[1].first_output) for tensor, parts in regions.items()}


def assemble_tensor(parts: list[tuple[str, TensorRegion]], get: Callable[[str], np.ndarray]) -> Any:
    """A tensor of the file from our weights; `get` returns an array by canonical name."""
    tensor = np.concatenate([region.to_file_layout(get(name)) for name, region in parts], axis=-1)
    return np.ascontiguousarray(tensor.T if parts[0][1].transposed else tensor)
