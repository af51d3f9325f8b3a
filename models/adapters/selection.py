"""Which weights are trained: one rule for adapters and for methods that train a part of the model's own weights.

A leaf of the run is trained where some layer of it is. Layers of it that are not trained get a mask, which multiplies
the optimizer's updates. Biases (BitFit), norms, the last layers, single matrices: all are patterns over weight names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from .adapted_modules import DEFAULT_TARGETS, in_trained_layers, layer_stacks, matches, select_names
from .registry import ADDED_MODULES, LINEAR_METHODS

RECIPE_WEIGHTS = "score/"  # a recipe's own weights are trained whatever the adapter's method trains

Names = dict[str, list[str]]  # path in the run -> canonical name of each of its layers, or its own


def canonical_names(paths: list[str], model: ModelConfig) -> Names:
    """The canonical names of the arrays that each of `paths` stacks."""
    layers = dict(layer_stacks(model))
    names = {}
    for path in paths:
        block, in_block, rest = path.partition("/block/")
        names[path] = [f"layers/{layer}/{rest}" for layer in layers[f"{block}/block"]] if in_block else [path]
    return names


def trained_masks(paths: list[str], model: ModelConfig, adapter: AdapterConfig) -> dict[str, np.ndarray]:
    """Path -> [layers] bool of every weight that is trained in some layer. Raises UserError where there is none."""
    names = canonical_names(paths, model)
    if adapter.method in LINEAR_METHODS:
        leaves = set(LINEAR_METHODS[adapter.method].trained_leaves) - ({"a"} if adapter.freeze_a else set())
        return {
            path: np.ones(len(layers), bool)
            for path, layers in names.items()
            if "/block/" in path and path.split("/")[-2] == "adapter" and path.split("/")[-1] in leaves
        }
    if adapter.method in ADDED_MODULES:
        suffixes = tuple(
            suffix for added_module in ADDED_MODULES[adapter.method] for suffix in added_module.trained_suffixes
        )
        return {path: np.ones(len(layers), bool) for path, layers in names.items() if f"/{path}".endswith(suffixes)}
    candidates = [name for layers in names.values() for name in layers]
    if adapter.method in ("bitfit", "norms"):
        patterns = DEFAULT_TARGETS[adapter.method]
        candidates = [name for name in candidates if any(matches(name, pattern) for pattern in patterns)]
        if not candidates:
            raise UserError(
                f"adapter.method: {adapter.method} trains weights that match {patterns[0]}, and this model has none; "
                "use another method, e.g. lora"
            )
    selected = select_names("adapter.targets", adapter.targets or default_patterns(adapter), candidates)
    selected = in_trained_layers(selected, model, adapter)
    masks = {path: np.array([name in selected for name in layers]) for path, layers in names.items()}
    return {path: mask for path, mask in masks.items() if mask.any()}


def update_scaler(
    model: ModelConfig, adapter: AdapterConfig, *, order: Sequence[int] | None = None
) -> Callable[[str, Any], Any] | None:
    """(path, update) -> the update scaled as `adapter` asks; None where no update is changed.

    LoRA+ takes larger steps along the second factor. Layers of a stack that are not selected take no step; weights that
    a recipe adds take their full step. `order` names the repeat at each position of the stacks, with -1 for padding;
    None: the repeats are in order.
    """
    if adapter.method in LINEAR_METHODS | ADDED_MODULES:
        if adapter.ratio == 1:
            return None
        return lambda path, update: update * adapter.ratio if path.endswith("/adapter/b") else update

    def mask_update(path: str, update: jax.Array) -> jax.Array:
        if path.startswith(RECIPE_WEIGHTS):
            return update
        mask = trained_layers(path, model, adapter)
        if order is not None and "/block/" in path:
            mask = np.array([repeat >= 0 and mask[repeat] for repeat in order])
        if mask.all():
            return update
        return update * jnp.asarray(mask, update.dtype).reshape(-1, *[1] * (update.ndim - 1))

    return mask_update


def trained_layers(path: str, model: ModelConfig, adapter: AdapterConfig) -> np.ndarray:
    """[layers] bool: the layers in which the weight at `path` is trained."""
    patterns = adapter.targets or default_patterns(adapter)
    names = canonical_names([path], model)[path]
    eligible = in_trained_layers(names, model, adapter)
    return np.array([name in eligible and any(matches(name, pattern) for pattern in patterns) for name in names])


def default_patterns(adapter: AdapterConfig) -> list[str]:
    """Patterns of trained weights for a user who names none; the method narrows them further."""
    return ["layers/*"] if adapter.method == "selective" else ["*"]
