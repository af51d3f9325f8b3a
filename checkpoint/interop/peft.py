"""Reads and writes adapters in PEFT directories: adapter_config.json and adapter_model.safetensors."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...configs.errors import UserError, first_line
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ...models.adapters import peft_reader, peft_writer
from ...models.adapters.adapted_modules import find_adapted_modules
from ...models.adapters.attach import added_leaves, copy_dicts, subtree
from ...models.adapters.registry import ADDED_MODULES
from ...models.adapters.selection import canonical_names

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
STARTS_FROM_BASE = ("pissa", "olora")  # initializations that subtract the initial adapter from the base model


def adapter_leaves(tree: Any, model: ModelConfig, adapter: AdapterConfig) -> dict[str, peft_writer.Leaves]:
    """Return the adapters in `tree` (run layout) by canonical module, each trimmed to its own rank, on the host."""
    result = {}
    for path, modules in added_modules(model, adapter).items():
        values = jax.device_get(subtree(tree, path))
        stacked = path.startswith("segments/")
        for layer, module in enumerate(modules):
            result[module] = {name: leaf[layer] if stacked else leaf for name, leaf in values.items()}
    if result:
        return result
    for target in find_adapted_modules(model, adapter):
        stack = jax.device_get(subtree(tree, f"{target.path}/adapter"))
        for layer, (module, rank) in enumerate(zip(target.layer_names, target.ranks, strict=True)):
            if rank:
                result[module] = {name: trim_to_rank(name, leaf[layer], rank) for name, leaf in stack.items()}
    if adapter.method == "vera":
        result[""] = jax.device_get(tree["adapter"])
    return result


def added_modules(model: ModelConfig, adapter: AdapterConfig) -> dict[str, list[str]]:
    """Return path in the run -> canonical names, for the modules that a method adds elsewhere than to linear maps."""
    paths: list[str] = []
    for addition in ADDED_MODULES.get(adapter.method, ()):
        paths += jax.eval_shape(partial(added_leaves, addition, model, adapter))
    return canonical_names(paths, model)


def trim_to_rank(name: str, leaf: np.ndarray, rank: int) -> np.ndarray:
    """Return a layer's leaf without the padding that only layers with a higher rank in its stack use."""
    if name == "a":
        return leaf[..., :rank]
    return leaf[:rank] if name in ("b", "e", "scale", "vera_d") else leaf


def change_since_start(
    initial: dict[str, peft_writer.Leaves], current: dict[str, peft_writer.Leaves]
) -> dict[str, peft_writer.Leaves]:
    """Convert adapters to the model before PiSSA or OLoRA subtracted the initial adapter from it. Doubles the rank.

    A B current - A B at the initial = [A current, A at the initial] [B current, -B at the initial].
    """
    return {
        name: leaves
        | {
            "a": np.concatenate([leaves["a"], initial[name]["a"]], axis=-1),
            "b": np.concatenate([leaves["b"], -initial[name]["b"]]),
            "scale": np.concatenate([leaves["scale"]] * 2),
        }
        for name, leaves in current.items()
    }


def write(
    tree: Any, model: ModelConfig, adapter: AdapterConfig, directory: Path, *, kind: str,
    initial_tree: Callable[[], Any],
) -> list[str]:  # fmt: skip
    """Write the adapters of `tree` for a base model of format `kind`; return the names of the files.

    `initial_tree` returns the tree before the first step; it is called only for some initializations. Raises like
    `peft_writer.to_peft`.
    """
    leaves = adapter_leaves(tree, model, adapter)
    if adapter.start in STARTS_FROM_BASE:
        leaves = change_since_start(adapter_leaves(initial_tree(), model, adapter), leaves)

    def column_norms(module: str) -> np.ndarray:
        target = next(target for target in targets if module in target.layer_names)
        kernel = np.asarray(subtree(tree, f"{target.path}/kernel")[target.layer_names.index(module)], np.float32)
        return np.sqrt(np.square(kernel).sum(tuple(range(len(target.inputs)))))

    targets = find_adapted_modules(model, AdapterConfig())
    config, tensors = peft_writer.to_peft(
        adapter, model, kind=kind, leaves=leaves, column_norms=column_norms, base=model.origin or ""
    )
    from safetensors.numpy import save_file

    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return [CONFIG, WEIGHTS]


def read(directory: Path, model: ModelConfig, *, kind: str) -> peft_reader.PeftAdapter:
    """Read the adapter in `directory` for `model` with files of format `kind`. Raises like `peft_reader.read`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{directory} is not an adapter ({first_line(error)}); it must contain {CONFIG} and {WEIGHTS}"
        ) from None
    return peft_reader.from_peft(config, tensors, model, kind=kind)


def load_adapters(tree: Any, peft_adapter: peft_reader.PeftAdapter, model: ModelConfig) -> Any:
    """Return `tree` (run layout, with initialized adapters) with its adapters replaced by `peft_adapter`."""
    result = copy_dicts(tree)
    for path, modules in added_modules(model, peft_adapter.adapter).items():
        leaves = subtree(result, path)
        for name in leaves:
            layers = [peft_adapter.leaves[module][name] for module in modules]
            leaves[name] = jnp.asarray(np.stack(layers) if path.startswith("segments/") else layers[0])
    if peft_adapter.adapter.method in ADDED_MODULES:
        return result
    for target in find_adapted_modules(model, peft_adapter.adapter):
        stack = subtree(result, f"{target.path}/adapter")
        for name, leaf in stack.items():
            layers = np.zeros(leaf.shape, leaf.dtype)
            for layer, module in enumerate(target.layer_names):
                if module in peft_adapter.leaves:
                    copy_leaf(layers[layer], peft_adapter.leaves[module][name], last=name == "a")
            stack[name] = jnp.asarray(layers)
    if "" in peft_adapter.leaves:
        for name, leaf in result["adapter"].items():
            wide = np.zeros(leaf.shape, np.float32)
            leaves = peft_adapter.leaves[""][name]
            wide[tuple(slice(size) for size in leaves.shape)] = leaves
            result["adapter"][name] = jnp.asarray(wide)
    return result


def copy_leaf(layer: np.ndarray, leaf: np.ndarray, *, last: bool) -> None:
    """Copy a leaf, whose dimensions may be flattened, into a layer of the stack, which may have a higher rank.

    `last`: the rank is the last dimension, else the first.
    """
    if last:
        layer[..., : leaf.shape[-1]] = leaf.reshape(*layer.shape[:-1], leaf.shape[-1])
    elif layer.ndim == leaf.ndim == 1:
        layer[: len(leaf)] = leaf
    elif leaf.ndim == 1:
        layer[...] = leaf.reshape(layer.shape)
    else:
        layer[: len(leaf)] = leaf.reshape(len(leaf), *layer.shape[1:])
