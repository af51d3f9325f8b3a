"""Reads an adapter in PEFT's format into our settings and leaves: the inverse of `peft_writer.py`. Pure numpy.

Features in an adapter_config.json that our adapters lack are refused; keys that matter only to training are not read.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from . import peft_prompt
from .peft_writer import OFT_SINCE, PREFIX, Leaves, PeftModule, peft_modules

# Key -> the values that mean what we compute; all others are refused.
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
}
SUPPORTED_INITS = (True, False, "gaussian", "orthogonal", "eva", None)  # these do not change the base model


class PeftAdapter(NamedTuple):
    """An adapter that was read."""

    adapter: AdapterConfig
    leaves: dict[str, Leaves]  # by canonical module; "" holds the shared matrices of VeRA


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: ModelConfig, *, kind: str
) -> PeftAdapter:
    """Settings and leaves for `model`, whose files are of format `kind`. Raises UserError for what is not supported."""
    if config.get("peft_type") in peft_prompt.METHOD_BY_PEFT_TYPE:
        return PeftAdapter(*peft_prompt.prompt_from_peft(config, tensors, model, kind=kind))
    method = find_method(config)
    unread = dict(tensors)
    leaves: dict[str, Leaves] = {}
    for module in peft_modules(model, kind):
        prefix = f"{PREFIX}{module.name}."
        names = [name for name in unread if name.startswith(prefix)]
        if arrays := {name.removeprefix(prefix): unread.pop(name) for name in names}:
            leaves |= READERS[method](module, arrays, config)
    if method == "vera":
        leaves[""] = {"a": unread.pop("base_model.vera_A").T, "b": unread.pop("base_model.vera_B").T}
    if unread:
        raise UserError(
            f"adapter_model.safetensors: {', '.join(sorted(unread)[:3])} ({len(unread)} in all) match no linear map of "
            "the model's blocks, and only those can have adapters; merge the adapter in PEFT"
        )
    return PeftAdapter(adapter_settings(method, leaves, model, config), leaves)


def find_method(config: Mapping[str, Any]) -> str:
    """Our name of the method. Raises UserError for a method or a variant that is not supported."""
    kind = str(config.get("peft_type"))
    methods = {
        "LORA": "dora" if config.get("use_dora") else "lora",
        "VERA": "vera",
        "IA3": "ia3",
        "ADALORA": "adalora",
        "OFT": "oft",
        "SHIRA": "shira",
    }
    if kind not in methods:
        raise UserError.no_match(
            "adapter_config.json: peft_type", [kind], candidates=methods | peft_prompt.METHOD_BY_PEFT_TYPE
        )
    for key, choices in REQUIRED_VALUES.items():
        if config.get(key) not in choices:
            raise UserError(
                f"adapter_config.json: {key}: {config[key]!r:.80} is not supported; only {choices[0]!r} is read"
            )
    start = config.get("init_lora_weights")
    if start not in SUPPORTED_INITS:
        raise UserError(
            f"adapter_config.json: init_lora_weights: {start!r} changes the base model too; "
            "convert the adapter in PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return methods[kind]


def part_outputs(module: PeftModule) -> Iterator[tuple[str, slice]]:
    """(canonical name, its outputs) of each of our maps that the module fuses."""
    first = 0
    for part, width in zip(module.parts, module.widths, strict=True):
        yield part, slice(first, first + width)
        first += width


def read_lora(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """a [inputs, rank], b [rank, outputs], scale [rank], magnitude [outputs] of each part, flattened.

    Each part of a fused module has all of A and its own rows of B.
    """
    a, b = tensors["lora_A.weight"].T, tensors["lora_B.weight"].T
    rank = a.shape[1]
    alpha = match_pattern(config.get("alpha_pattern") or {}, module.name, config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    leaves = {}
    for part, outputs in part_outputs(module):
        leaves[part] = {"a": a, "b": b[:, outputs], "scale": np.full(rank, scale, np.float32)}
        if "lora_magnitude_vector" in tensors:
            leaves[part]["magnitude"] = tensors["lora_magnitude_vector"].reshape(-1)[outputs]
    return leaves


def read_ia3(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """The vector of each part."""
    del config
    vector, scale = tensors["ia3_l"], {"scale": np.ones(1, np.float32)}
    scales_input = vector.shape[0] == 1 and vector.shape[1] == module.inputs
    if scales_input != module.parts[0].endswith("mlp/down"):
        raise UserError(
            f"adapter_config.json: feedforward_modules: {module.name} is {'one' if scales_input else 'none'} of them; "
            "the input is scaled of the last map of the feed-forward part only; merge the adapter in PEFT"
        )
    if scales_input:
        return {module.parts[0]: {"input_scale": vector.reshape(-1)} | scale}
    return {part: {"output_scale": vector.reshape(-1)[outputs]} | scale for part, outputs in part_outputs(module)}


def read_vera(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """vera_d [rank] and vera_b [outputs] of a map."""
    del config
    scale = np.ones(len(tensors["vera_lambda_d"]), np.float32)
    return {
        single_part(module): {"vera_d": tensors["vera_lambda_d"], "vera_b": tensors["vera_lambda_b"], "scale": scale}
    }


def single_part(module: PeftModule) -> str:
    """The one map of ours that the module is. Raises UserError where it fuses several."""
    if len(module.parts) > 1:
        raise UserError(
            f"adapter_model.safetensors: {module.name} fuses {', '.join(module.parts)}, which have an adapter each "
            "here; merge the adapter in PEFT"
        )
    return module.parts[0]


def read_oft(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """The rotations of a map."""
    for key, only in (("block_share", False), ("coft", False), ("use_cayley_neumann", True)):
        if config.get(key, only) != only:
            raise UserError(f"adapter_config.json: {key}: {config[key]!r} is not supported; only {only} is read")
    if (terms := config.get("num_cayley_neumann_terms", 5)) != 5:
        raise UserError(f"adapter_config.json: num_cayley_neumann_terms: {terms} is not supported; only 5 is read")
    version = str(config.get("peft_version", "0.0.0"))
    if release(version) < release(OFT_SINCE):
        raise UserError(
            f"adapter_config.json: peft_version: {version} computes rotations by another series than PEFT since "
            f"{OFT_SINCE}; train the adapter again with that, or merge it with the version that made it"
        )
    return {single_part(module): {"r": tensors["oft_R.weight"], "scale": np.ones(1, np.float32)}}


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of "0.18.1.dev0@hash"."""
    return tuple(int(part) for part in version.split(".")[:2])


def read_adalora(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """a, e and b of a map, padded with zeros to `init_r`: the file lacks the ranks that were pruned."""
    rank = int(config["init_r"])
    if len(tensors["lora_E"]) > rank:
        raise UserError(f"adapter_config.json: init_r: {rank}, but {module.name} has {len(tensors['lora_E'])} ranks")
    pruned = rank - len(tensors["lora_E"])
    e = tensors["lora_E"][:, 0] / (1 + 1e-5 / rank)
    scale = np.full(rank, float(config["lora_alpha"]) / rank, np.float32)
    return {
        single_part(module): {
            "a": np.pad(tensors["lora_A"].T, ((0, 0), (0, pruned))),
            "b": np.pad(tensors["lora_B"].T, ((0, pruned), (0, 0))),
            "e": np.pad(e, (0, pruned)),
            "scale": scale,
        }
    }


def read_shira(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """The trained entries of a map, and their indices."""
    del config
    indices = tensors["shira_indices"][::-1].astype(np.int32)
    return {
        single_part(module): {"values": tensors["shira_weight"], "indices": indices, "scale": np.ones(1, np.float32)}
    }


READERS = {
    "lora": read_lora,
    "dora": read_lora,
    "vera": read_vera,
    "ia3": read_ia3,
    "adalora": read_adalora,
    "oft": read_oft,
    "shira": read_shira,
}


def match_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first regular expression in `patterns` that the end of `name` matches, else `default`."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def adapter_settings(
    method: str, leaves: Mapping[str, Leaves], model: ModelConfig, config: Mapping[str, Any]
) -> AdapterConfig:
    """The section adapter that has exactly these leaves."""
    modules = [name for name in leaves if name]
    common: dict[str, Any] = {"method": method, "targets": target_patterns(modules, model)}
    if method == "ia3":
        return AdapterConfig(**common)
    if method == "oft":
        sizes = {math.isqrt(2 * leaves[name]["r"].shape[1]) + 1 for name in modules}
        if len(sizes) > 1:
            raise UserError(
                f"adapter_config.json: oft_block_size: blocks of {sorted(sizes)} in one file; only one size is read"
            )
        return AdapterConfig(**common, block=sizes.pop())
    if method == "adalora":
        rank = int(config["init_r"])
        budget = {"rank": min(int(config["target_r"]), rank)}
        return AdapterConfig(**common, rank=rank, alpha=float(config["lora_alpha"]), budget=budget)
    if method == "shira":
        return AdapterConfig(**common, rank=int(config["r"]))
    ranks = {name: len(leaves[name]["scale"]) for name in modules}
    widest = max(ranks.values())
    if method == "vera":
        return AdapterConfig(**common, rank=widest)
    stabilized = bool(config.get("use_rslora"))
    alphas = {
        name: float(leaves[name]["scale"][0]) * (math.sqrt(rank) if stabilized else rank)
        for name, rank in ranks.items()
    }
    alpha = max(alphas.values())
    return AdapterConfig(
        **common,
        rank=widest,
        alpha=alpha,
        rank_stabilized=stabilized,
        ranks={name: rank for name, rank in ranks.items() if rank != widest},
        alphas={name: other for name, other in alphas.items() if other != alpha},
    )


def target_patterns(names: list[str], model: ModelConfig) -> list[str]:
    """Patterns that match these modules: `attn/q` where every layer has it, else full names."""
    by_map: dict[str, list[str]] = {}
    for name in names:
        by_map.setdefault(name.split("/", 2)[2], []).append(name)
    return [name for key, layers in by_map.items() for name in ([key] if len(layers) == model.layers else layers)]
