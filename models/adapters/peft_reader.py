"""An adapter of PEFT -> our settings and leaves: `peft.py` the other way.

What an adapter_config.json asks for that these adapters do not do is refused; keys that matter only before training are
not read. Pure numpy.
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

# Keys with the only values that mean what we compute.
REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "target_parameters": (None, []),
}
SUPPORTED_INITS = (True, False, "gaussian", "orthogonal", "eva", None)  # these leave the base model as it is


class PeftAdapter(NamedTuple):
    """An adapter as this framework has it."""

    adapter: AdapterConfig
    leaves: dict[str, Leaves]  # by canonical module; "" holds VeRA's shared pair


def from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: ModelConfig, *, kind: str
) -> PeftAdapter:
    """Settings and leaves for `model`, whose files are of format `kind`. Raises UserError for what we do not have."""
    if config.get("peft_type") in peft_prompt.METHOD_BY_PEFT_TYPE:
        return PeftAdapter(*peft_prompt.prompt_from_peft(config, tensors, model, kind=kind))
    method = find_method(config)
    left = dict(tensors)
    leaves: dict[str, Leaves] = {}
    for module in peft_modules(model, kind):
        own = pop_module(left, f"{PREFIX}{module.name}.")
        if own:
            leaves |= READERS[method](module, own, config)
    if method == "vera":
        leaves[""] = {"a": left.pop("base_model.vera_A").T, "b": left.pop("base_model.vera_B").T}
    if left:
        raise UserError(
            f"adapter_model.safetensors: {', '.join(sorted(left)[:3])} ({len(left)} in all) has no place here; "
            "only linear maps of its blocks can be adapted here"
        )
    return PeftAdapter(adapter_settings(method, leaves, model, config), leaves)


def find_method(config: Mapping[str, Any]) -> str:
    """Our name of the method. Raises UserError for one we do not have, or a variant of it."""
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
            "adapter_config.json: peft_type", [kind], known=methods | peft_prompt.METHOD_BY_PEFT_TYPE
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


def pop_module(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Remove the tensors of one module, and return them by the rest of their names."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}


def part_outputs(module: PeftModule) -> Iterator[tuple[str, slice]]:
    """(canonical module, its outputs) of each map a module of theirs is."""
    first = 0
    for part, width in zip(module.parts, module.widths, strict=True):
        yield part, slice(first, first + width)
        first += width


def read_lora(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """a [inputs, rank], b [rank, outputs], scale [rank], magnitude [outputs] of each part; inputs, outputs flattened.

    A part of a fused map has the whole A and its own rows of B.
    """
    a, b = tensors["lora_A.weight"].T, tensors["lora_B.weight"].T
    rank = a.shape[1]
    alpha = match_pattern(config.get("alpha_pattern") or {}, module.name, config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    found = {}
    for part, outputs in part_outputs(module):
        found[part] = {"a": a, "b": b[:, outputs], "scale": np.full(rank, scale, np.float32)}
        if "lora_magnitude_vector" in tensors:
            found[part]["magnitude"] = tensors["lora_magnitude_vector"].reshape(-1)[outputs]
    return found


def read_ia3(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """The vector of each part."""
    del config
    vector, on = tensors["ia3_l"], {"scale": np.ones(1, np.float32)}
    reads = vector.shape[0] == 1 and vector.shape[1] == module.inputs
    if reads != module.parts[0].endswith("mlp/down"):
        raise UserError(
            f"adapter_config.json: feedforward_modules: {module.name} is {'one' if reads else 'none'} of them; only "
            "the map out of the feed-forward part is scaled where it reads"
        )
    if reads:
        return {module.parts[0]: {"input_scale": vector.reshape(-1)} | on}
    return {part: {"output_scale": vector.reshape(-1)[outputs]} | on for part, outputs in part_outputs(module)}


def read_vera(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """The two vectors of a map."""
    del config
    scale = np.ones(len(tensors["vera_lambda_d"]), np.float32)
    return {
        single_part(module): {"vera_d": tensors["vera_lambda_d"], "vera_b": tensors["vera_lambda_b"], "scale": scale}
    }


def single_part(module: PeftModule) -> str:
    """The map that a module of theirs is. Raises UserError where it is several."""
    if len(module.parts) > 1:
        raise UserError(f"adapter_model.safetensors: {module.name} is one map in the file and several here; merge it")
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
            f"adapter_config.json: peft_version: {version}, but rotations are read as PEFT makes them since "
            f"{OFT_SINCE}, by another series; train it again there, or merge it with the version that made it"
        )
    return {single_part(module): {"r": tensors["oft_R.weight"], "scale": np.ones(1, np.float32)}}


def release(version: str) -> tuple[int, ...]:
    """Major and minor number of "0.18.1.dev0@hash"."""
    return tuple(int(part) for part in version.split(".")[:2])


def read_adalora(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """The triplets of a map. Those that were taken away are not in the file: they become zeros."""
    first = int(config["init_r"])
    if len(tensors["lora_E"]) > first:
        raise UserError(f"adapter_config.json: init_r: {first}, but {module.name} has {len(tensors['lora_E'])} ranks")
    room = first - len(tensors["lora_E"])
    e = tensors["lora_E"][:, 0] / (1 + 1e-5 / first)
    scale = np.full(first, float(config["lora_alpha"]) / first, np.float32)
    return {
        single_part(module): {
            "a": np.pad(tensors["lora_A"].T, ((0, 0), (0, room))),
            "b": np.pad(tensors["lora_B"].T, ((0, room), (0, 0))),
            "e": np.pad(e, (0, room)),
            "scale": scale,
        }
    }


def read_shira(module: PeftModule, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> dict[str, Leaves]:
    """The entries of a map, and where they are."""
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
    """What PEFT gives the module called `name`: the value of the first key it ends in, as a regular expression."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def adapter_settings(
    method: str, leaves: Mapping[str, Leaves], model: ModelConfig, config: Mapping[str, Any]
) -> AdapterConfig:
    """The adapter section that has exactly these leaves."""
    found = [name for name in leaves if name]
    given: dict[str, Any] = {"method": method, "targets": target_patterns(found, model)}
    if method == "ia3":
        return AdapterConfig(**given)
    if method == "oft":
        sizes = {math.isqrt(2 * leaves[name]["r"].shape[1]) + 1 for name in found}
        if len(sizes) > 1:
            raise UserError(
                f"adapter_config.json: oft_block_size: blocks of {sorted(sizes)} in one file; only one size is read"
            )
        return AdapterConfig(**given, block=sizes.pop())
    if method == "adalora":
        first = int(config["init_r"])
        budget = {"rank": min(int(config["target_r"]), first)}
        return AdapterConfig(**given, rank=first, alpha=float(config["lora_alpha"]), budget=budget)
    if method == "shira":
        return AdapterConfig(**given, rank=int(config["r"]))
    ranks = {name: len(leaves[name]["scale"]) for name in found}
    usual = max(ranks.values())
    if method == "vera":
        return AdapterConfig(**given, rank=usual)
    stabilized = bool(config.get("use_rslora"))
    alphas = {
        name: float(leaves[name]["scale"][0]) * (math.sqrt(rank) if stabilized else rank)
        for name, rank in ranks.items()
    }
    alpha = max(alphas.values())
    return AdapterConfig(
        **given,
        rank=usual,
        alpha=alpha,
        rank_stabilized=stabilized,
        ranks={name: rank for name, rank in ranks.items() if rank != usual},
        alphas={name: own for name, own in alphas.items() if own != alpha},
    )


def target_patterns(names: list[str], model: ModelConfig) -> list[str]:
    """Patterns for these modules: `attn/q` where every layer's is among them."""
    by_map: dict[str, list[str]] = {}
    for name in names:
        by_map.setdefault(name.split("/", 2)[2], []).append(name)
    return [name for key, own in by_map.items() for name in ([key] if len(own) == model.layers else own)]
