"""Adapters as PEFT keeps them: adapter_config.json and the names and shapes in adapter_model.safetensors.

    ours:    layers/7/attn/q   a [inputs..., rank]   b [rank, outputs...]   magnitude [outputs...]
    theirs:  base_model.model.model.layers.7.self_attn.q_proj   .lora_A.weight [rank, inputs]
                                     .lora_B.weight [outputs, rank]   .lora_magnitude_vector [outputs]

Maps that are one in the file (q, k, v of GPT-2 and Phi-3) become one adapter: A's one below the other, B's on a
diagonal of blocks, so that ranks add. Pure numpy.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..families.tensor_regions import fused_modules
from ..families.weight_names import INPUTS_FIRST, MODULE_NAMES
from . import peft_prompt
from .adapted_modules import linear_maps

Leaves = dict[str, np.ndarray]
PREFIX = "base_model.model."
OFT_SINCE = "0.18.0"  # the version of PEFT whose series of rotations ours is
PEFT_TYPES = {
    "lora": "LORA",
    "dora": "LORA",
    "adalora": "ADALORA",
    "vera": "VERA",
    "ia3": "IA3",
    "oft": "OFT",
    "shira": "SHIRA",
}


@dataclass(frozen=True)
class PeftModule:
    """A module of theirs, and the maps of ours that it is, by canonical name, in the order of its outputs."""

    name: str  # model.layers.7.self_attn.q_proj
    parts: tuple[str, ...]
    inputs: int
    widths: tuple[int, ...]  # outputs of each part


def peft_modules(model: ModelConfig, kind: str) -> list[PeftModule]:
    """Every linear map of the blocks as a file of format `kind` has it."""
    table, maps, found = MODULE_NAMES[kind], linear_maps(model), []
    for layer in range(model.layers):
        for key in maps:
            keys = fused_modules(f"layers/{{}}/{key}", table)
            if keys[0] == f"layers/{{}}/{key}":
                sizes = [maps[one.removeprefix("layers/{}/")] for one in keys]
                widths = tuple(math.prod(outputs) for _, outputs in sizes)
                parts = tuple(one.format(layer) for one in keys)
                found.append(PeftModule(table[keys[0]].format(layer), parts, math.prod(sizes[0][0]), widths))
    return found


def to_peft(
    adapter: AdapterConfig,
    model: ModelConfig,
    *,
    kind: str,
    leaves: Mapping[str, Leaves],
    column_norms: Callable[[str], np.ndarray],
    base: str,
) -> tuple[dict[str, Any], Leaves]:
    """(adapter_config.json, tensors) of the adapters in `leaves`, by canonical module, cut to their ranks.

    `lengths` gives |W| over the inputs of a module, for DoRA beside maps it does not adapt. `base` is the path of the
    model they belong to. Raises UserError for a method PEFT has no file for.
    """
    if adapter.method in peft_prompt.PEFT_TYPES:
        return peft_prompt.prompt_to_peft(adapter, model, kind=kind, leaves=leaves, base=base)
    if adapter.method not in PEFT_TYPES:
        raise UserError(
            f"adapter.method: {adapter.method} has no file in PEFT; `meshwright checkpoint export` merges what can be "
            "merged"
        )
    adapted = [module for module in peft_modules(model, kind) if any(part in leaves for part in module.parts)]
    if adapter.method == "ia3":
        tensors, settings = ia3_to_peft(adapted, leaves)
    elif adapter.method == "vera":
        tensors, settings = vera_to_peft(adapted, leaves, adapter)
    elif adapter.method == "oft":
        tensors, settings = oft_to_peft(adapted, leaves, adapter)
    elif adapter.method == "adalora":
        tensors, settings = adalora_to_peft(adapted, leaves, adapter)
    elif adapter.method == "shira":
        tensors, settings = shira_to_peft(adapted, leaves, adapter)
    else:
        tensors, settings = lora_to_peft(adapted, leaves, adapter, column_norms)
    targets = short_target_names([module.name for module in adapted], peft_modules(model, kind))
    if "feedforward_modules" in settings:
        inside = settings["feedforward_modules"]
        settings["feedforward_modules"] = [name for name in targets if any(is_target(one, name) for one in inside)]
    common = {
        "peft_type": PEFT_TYPES[adapter.method],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "fan_in_fan_out": kind in INPUTS_FIRST,
        "target_modules": targets,
    }
    return common | settings, {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def is_target(name: str, target: str) -> bool:
    """Whether PEFT takes `name` for the target: it is that, or ends in it behind a dot."""
    return name == target or name.endswith(f".{target}")


def short_target_names(names: list[str], all_modules: list[PeftModule]) -> list[str]:
    """`["q_proj", "v_proj"]` where these modules are the only ones so called; whole names otherwise."""
    last = sorted({name.rpartition(".")[2] for name in names})
    meant = sorted(module.name for module in all_modules if module.name.rpartition(".")[2] in last)
    return last if meant == sorted(names) else sorted(names)


def lora_to_peft(
    modules: list[PeftModule],
    leaves: Mapping[str, Leaves],
    adapter: AdapterConfig,
    column_norms: Callable[[str], np.ndarray],
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of LoRA and DoRA; ranks and alphas that differ go into the patterns."""
    tensors, ranks, alphas = {}, {}, {}
    for module in modules:
        own = [leaves.get(part) for part in module.parts]
        scale = next(float(one["scale"][0]) for one in own if one)
        # Ones in a file have one scale: the others' is put into their second factor.
        a = [one["a"].reshape(module.inputs, -1).T for one in own if one]
        b = [
            one["b"].reshape(-1, width).T * (float(one["scale"][0]) / scale) if one else np.zeros((width, 0))
            for one, width in zip(own, module.widths, strict=True)
        ]
        tensors[f"{PREFIX}{module.name}.lora_A.weight"] = np.concatenate(a).astype(np.float32)
        tensors[f"{PREFIX}{module.name}.lora_B.weight"] = block_diagonal(b).astype(np.float32)
        if adapter.method == "dora":
            sizes = [
                one["magnitude"].reshape(-1) if one else column_norms(part).reshape(-1)
                for one, part in zip(own, module.parts, strict=True)
            ]
            tensors[f"{PREFIX}{module.name}.lora_magnitude_vector"] = np.concatenate(sizes).astype(np.float32)
        rank = sum(len(one) for one in a)
        ranks[module.name] = rank
        alphas[module.name] = scale * (math.sqrt(rank) if adapter.rank_stabilized else rank)
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    return tensors, {
        "r": rank,
        "lora_alpha": as_integer(alpha),
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilized,
        "use_dora": adapter.method == "dora",
        "bias": "none",
        "init_lora_weights": True,
        "rank_pattern": {re.escape(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {re.escape(name): as_integer(own) for name, own in alphas.items() if own != alpha},
    }


def as_integer(number: float) -> float | int:
    """The integer, where it is one to seven digits."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-7) else number


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """Blocks [outputs, rank] on a diagonal, zeros elsewhere."""
    result = np.zeros((sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks)))
    row = column = 0
    for block in blocks:
        result[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return result


def ia3_to_peft(modules: list[PeftModule], leaves: Mapping[str, Leaves]) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of IA3; parts without adapter have ones."""
    tensors, reading = {}, []
    for module in modules:
        own = [leaves.get(part) for part in module.parts]
        if own[0] is not None and "input_scale" in own[0]:
            tensors[f"{PREFIX}{module.name}.ia3_l"] = own[0]["input_scale"].reshape(1, -1)
            reading.append(module.name)
            continue
        vectors = [
            one["output_scale"].reshape(-1) if one else np.ones(width, np.float32)
            for one, width in zip(own, module.widths, strict=True)
        ]
        tensors[f"{PREFIX}{module.name}.ia3_l"] = np.concatenate(vectors)[:, None]
    return tensors, {"feedforward_modules": reading, "init_ia3_weights": True}


def vera_to_peft(
    modules: list[PeftModule], leaves: Mapping[str, Leaves], adapter: AdapterConfig
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of VeRA; the shared pair is under "" in `leaves`, and as wide as the chosen maps need."""
    refuse_fused(modules, adapter)
    tensors = {}
    for module in modules:
        tensors[f"{PREFIX}{module.name}.vera_lambda_b"] = leaves[module.parts[0]]["vera_b"].reshape(-1)
        tensors[f"{PREFIX}{module.name}.vera_lambda_d"] = leaves[module.parts[0]]["vera_d"]
    inputs, outputs = max(module.inputs for module in modules), max(module.widths[0] for module in modules)
    pair = {"vera_A": leaves[""]["a"][:inputs].T, "vera_B": leaves[""]["b"][:, :outputs].T}
    tensors |= {f"base_model.{name}": array for name, array in pair.items()}
    return tensors, {
        "r": adapter.rank,
        "vera_dropout": adapter.dropout,
        "d_initial": 0.1,
        "projection_prng_key": 0,
        "save_projection": True,
        "bias": "none",
    }


def refuse_fused(modules: list[PeftModule], adapter: AdapterConfig) -> None:
    """Raise UserError where maps that are one in the file would need one adapter for all of them."""
    if joined := next((module.name for module in modules if len(module.parts) > 1), None):
        raise UserError(
            f"adapter.method: {adapter.method} on {joined}, which is one map in the file and several here, with one "
            "adapter each: use `meshwright checkpoint export`, which merges"
        )


def oft_to_peft(
    modules: list[PeftModule], leaves: Mapping[str, Leaves], adapter: AdapterConfig
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of OFT."""
    refuse_fused(modules, adapter)
    tensors = {f"{PREFIX}{module.name}.oft_R.weight": leaves[module.parts[0]]["r"] for module in modules}
    return tensors, {
        "r": 0,
        "oft_block_size": adapter.block,
        "module_dropout": 0.0,
        "use_cayley_neumann": True,
        "num_cayley_neumann_terms": 5,
        "peft_version": OFT_SINCE,  # a file that does not say so is taken for one of the series before
        "bias": "none",
    }


def adalora_to_peft(
    modules: list[PeftModule], leaves: Mapping[str, Leaves], adapter: AdapterConfig
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of AdaLoRA; theirs multiplies by alpha / (rank + 1e-5), which e makes good."""
    refuse_fused(modules, adapter)
    tensors = {}
    for module in modules:
        own, name = leaves[module.parts[0]], f"{PREFIX}{module.name}"
        tensors[f"{name}.lora_A"] = own["a"].reshape(module.inputs, -1).T
        tensors[f"{name}.lora_B"] = own["b"].reshape(-1, module.widths[0]).T
        tensors[f"{name}.lora_E"] = ((1 + 1e-5 / adapter.rank) * own["e"])[:, None].astype(np.float32)
    return tensors, {
        "init_r": adapter.rank,
        "target_r": adapter.budget.rank,
        "r": adapter.budget.rank,
        "lora_alpha": as_integer(adapter.rank if adapter.alpha is None else adapter.alpha),
        "lora_dropout": adapter.dropout,
        "tinit": adapter.budget.after,
        "tfinal": adapter.budget.settled,
        "deltaT": adapter.budget.every,
        "orth_reg_weight": adapter.budget.orthogonality,
        "total_step": adapter.budget.after + adapter.budget.settled + 1,  # asked for, and read by training alone
        "bias": "none",
    }


def shira_to_peft(
    modules: list[PeftModule], leaves: Mapping[str, Leaves], adapter: AdapterConfig
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of SHiRA; places are [2, entries] of the weight [outputs, inputs]."""
    refuse_fused(modules, adapter)
    tensors = {}
    for module in modules:
        own = leaves[module.parts[0]]
        tensors[f"{PREFIX}{module.name}.shira_weight"] = own["values"]
        tensors[f"{PREFIX}{module.name}.shira_indices"] = own["indices"][::-1].astype(np.int32)
    return tensors, {"r": adapter.rank, "mask_type": "random", "random_seed": 0}
