"""A run's adapters to and from a directory of PEFT: adapter_config.json and adapter_model.safetensors."""

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
STARTS_FROM_BASE = ("pissa", "olora")  # what took its start out of the base model


def adapter_leaves(tree: Any, model: ModelConfig, adapter: AdapterConfig) -> dict[str, peft_writer.Leaves]:
    """The adapters in `tree` (the run's layout) by canonical module, each as wide as its own rank, on the host."""
    found = {}
    for path, modules in added_modules(model, adapter).items():
        whole = jax.device_get(subtree(tree, path))
        stacked = path.startswith("segments/")
        for layer, module in enumerate(modules):
            found[module] = {name: leaf[layer] if stacked else leaf for name, leaf in whole.items()}
    if found:
        return found
    for site in find_adapted_modules(model, adapter):
        stack = jax.device_get(subtree(tree, f"{site.path}/adapter"))
        for layer, (module, rank) in enumerate(zip(site.layer_names, site.ranks, strict=True)):
            if rank:
                found[module] = {name: trim_to_rank(name, leaf[layer], rank) for name, leaf in stack.items()}
    if adapter.method == "vera":
        found[""] = jax.device_get(tree["adapter"])
    return found


def added_modules(model: ModelConfig, adapter: AdapterConfig) -> dict[str, list[str]]:
    """Path in the run -> canonical names of the modules that a method adds elsewhere than to linear maps."""
    paths: list[str] = []
    for addition in ADDED_MODULES.get(adapter.method, ()):
        paths += jax.eval_shape(partial(added_leaves, addition, model, adapter))
    return canonical_names(paths, model)


def trim_to_rank(name: str, leaf: np.ndarray, rank: int) -> np.ndarray:
    """A layer's leaf without the part that only wider layers of its stack use."""
    if name == "a":
        return leaf[..., :rank]
    return leaf[:rank] if name in ("b", "e", "scale", "vera_d") else leaf


def change_since_start(
    start: dict[str, peft_writer.Leaves], now: dict[str, peft_writer.Leaves]
) -> dict[str, peft_writer.Leaves]:
    """Adapters for the model as it was before PiSSA or OLoRA took their start out of it: twice as wide.

    A B now - A B then = [A now, A then] [B now, -B then].
    """
    return {
        name: own
        | {
            "a": np.concatenate([own["a"], start[name]["a"]], axis=-1),
            "b": np.concatenate([own["b"], -start[name]["b"]]),
            "scale": np.concatenate([own["scale"]] * 2),
        }
        for name, own in now.items()
    }


def write(
    tree: Any,
    model: ModelConfig,
    adapter: AdapterConfig,
    directory: Path,
    *,
    kind: str,
    initial_tree: Callable[[], Any],
) -> list[str]:
    """Write the adapters of `tree` for a base model of format `kind`; the names written.

    `started` makes the tree before the first step, which only some starts need. Raises as `peft.written`.
    """
    leaves = adapter_leaves(tree, model, adapter)
    if adapter.start in STARTS_FROM_BASE:
        leaves = change_since_start(adapter_leaves(initial_tree(), model, adapter), leaves)

    def lengths(module: str) -> np.ndarray:
        site, layer = next((site, site.layer_names.index(module)) for site in every if module in site.layer_names)
        kernel = np.asarray(subtree(tree, f"{site.path}/kernel")[layer], np.float32)
        return np.sqrt(np.square(kernel).sum(tuple(range(len(site.inputs)))))

    every = find_adapted_modules(model, AdapterConfig())
    config, tensors = peft_writer.to_peft(
        adapter, model, kind=kind, leaves=leaves, column_norms=lengths, base=model.origin or ""
    )
    from safetensors.numpy import save_file

    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return [CONFIG, WEIGHTS]


def read(directory: Path, model: ModelConfig, *, kind: str) -> peft_reader.PeftAdapter:
    """The adapter in `directory`, for `model` with files of format `kind`. Raises as `peft_reader.read`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{directory}: not an adapter ({first_line(error)}); it must hold {CONFIG} and {WEIGHTS}"
        ) from None
    return peft_reader.from_peft(config, tensors, model, kind=kind)


def load_adapters(tree: Any, found: peft_reader.PeftAdapter, model: ModelConfig) -> Any:
    """`tree` (the run's layout, adapters started) with the leaves that were read in place of its own."""
    result = copy_dicts(tree)
    for path, modules in added_modules(model, found.adapter).items():
        own = subtree(result, path)
        for name in own:
            layers = [found.leaves[module][name] for module in modules]
            own[name] = jnp.asarray(np.stack(layers) if path.startswith("segments/") else layers[0])
    if found.adapter.method in ADDED_MODULES:
        return result
    for site in find_adapted_modules(model, found.adapter):
        stack = subtree(result, f"{site.path}/adapter")
        for name, leaf in stack.items():
            layers = np.zeros(leaf.shape, leaf.dtype)
            for layer, module in enumerate(site.layer_names):
                if module in found.leaves:
                    copy_leaf(layers[layer], found.leaves[module][name], last=name == "a")
            stack[name] = jnp.asarray(layers)
    if "" in found.leaves:
        for name, leaf in result["adapter"].items():
            wide = np.zeros(leaf.shape, np.float32)
            own = found.leaves[""][name]
            wide[tuple(slice(size) for size in own.shape)] = own
            result["adapter"][name] = jnp.asarray(wide)
    return result


def copy_leaf(layer: np.ndarray, leaf: np.ndarray, *, last: bool) -> None:
    """Write a leaf, its inputs and outputs flattened, into a layer's array that may be wider; `last`: along its end."""
    if last:
        layer[..., : leaf.shape[-1]] = leaf.reshape(*layer.shape[:-1], leaf.shape[-1])
    elif layer.ndim == leaf.ndim == 1:
        layer[: len(leaf)] = leaf
    elif leaf.ndim == 1:
        layer[...] = leaf.reshape(layer.shape)
    else:
        layer[: len(leaf)] = leaf.reshape(len(leaf), *layer.shape[1:])
