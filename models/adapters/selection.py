"""What is trained: one rule for adapters and for methods that choose among the model's own weights.

A leaf of the run is trained where some layer of it is; layers of it that are not get a mask, which the optimizer
multiplies its updates by. Biases (BitFit), norms, the last layers, single matrices: all are patterns over weight names.
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

RECIPE_WEIGHTS = "score/"  # a recipe's own weights: whatever the method chooses among the model's, they learn

Names = dict[str, list[str]]  # path in the run -> canonical name of each of its layers, or its own


def canonical_names(paths: list[str], model: ModelConfig) -> Names:
    """The canonical names of what each of `paths` holds."""
    layers = dict(layer_stacks(model))
    names = {}
    for path in paths:
        block, found, rest = path.partition("/block/")
        names[path] = [f"layers/{layer}/{rest}" for layer in layers[f"{block}/block"]] if found else [path]
    return names


def trained_masks(paths: list[str], model: ModelConfig, adapter: AdapterConfig) -> dict[str, np.ndarray]:
    """Path -> [layers] bool of every weight that learns, in some layer at least. UserError where there is none."""
    names = canonical_names(paths, model)
    if adapter.method in LINEAR_METHODS:
        leaves = set(LINEAR_METHODS[adapter.method].trained) - ({"a"} if adapter.freeze_a else set())
        return {
            path: np.ones(len(own), bool)
            for path, own in names.items()
            if "/block/" in path and path.split("/")[-2] == "adapter" and path.split("/")[-1] in leaves
        }
    if adapter.method in ADDED_MODULES:
        ends = tuple(end for addition in ADDED_MODULES[adapter.method] for end in addition.trained)
        return {path: np.ones(len(own), bool) for path, own in names.items() if f"/{path}".endswith(ends)}
    every = [name for own in names.values() for name in own]
    if adapter.method in ("bitfit", "norms"):
        patterns = DEFAULT_TARGETS[adapter.method]
        every = [name for name in every if any(matches(name, pattern) for pattern in patterns)]
        if not every:
            raise UserError(f"adapter.method: {adapter.method} trains {patterns[0]}, of which this model has none")
    chosen = in_trained_layers(
        select_names("adapter.targets", adapter.targets or default_patterns(adapter), every), model, adapter
    )
    flags = {path: np.array([name in chosen for name in own]) for path, own in names.items()}
    return {path: own for path, own in flags.items() if own.any()}


def update_scaler(
    model: ModelConfig, adapter: AdapterConfig, *, order: Sequence[int] | None = None
) -> Callable[[str, Any], Any] | None:
    """(path, update) -> the update as `adapter` wants it; None where nothing is to be done to any.

    LoRA+ takes larger steps along the second factor; layers of a stack that are not chosen take none, and what a recipe
    adds of its own takes all. `order` says which repeat stands at each place of the stacks, -1: none; by default they
    stand in order.
    """
    if adapter.method in LINEAR_METHODS | ADDED_MODULES:
        if adapter.ratio == 1:
            return None
        return lambda path, update: update * adapter.ratio if path.endswith("/adapter/b") else update

    def masked(path: str, update: jax.Array) -> jax.Array:
        if path.startswith(RECIPE_WEIGHTS):
            return update
        flags = trained_layers(path, model, adapter)
        if order is not None and "/block/" in path:
            flags = np.array([repeat >= 0 and flags[repeat] for repeat in order])
        return (
            update if flags.all() else update * jnp.asarray(flags, update.dtype).reshape(-1, *[1] * (update.ndim - 1))
        )

    return masked


def trained_layers(path: str, model: ModelConfig, adapter: AdapterConfig) -> np.ndarray:
    """[layers] bool: which layers of the trained weight at `path` learn."""
    patterns = adapter.targets or default_patterns(adapter)
    own = canonical_names([path], model)[path]
    inside = in_trained_layers(own, model, adapter)
    return np.array([name in inside and any(matches(name, pattern) for pattern in patterns) for name in own])


def default_patterns(adapter: AdapterConfig) -> list[str]:
    """Patterns where the user gives none, of what the method may train."""
    return ["layers/*"] if adapter.method == "selective" else ["*"]
