"""Adapters in PEFT's format: adapter_config.json and the tensors of adapter_model.safetensors. Pure numpy.

    ours:  layers/7/attn/q   a [inputs..., rank]   b [rank, outputs...]   magnitude [outputs...]
    PEFT:  base_model.model.model.layers.7.self_attn.q_proj   .lora_A.weight [rank, inputs]
                                     .lora_B.weight [outputs, rank]   .lora_magnitude_vector [outputs]

Maps that the file fuses (q, k, v of GPT-2 and Phi-3) become one adapter: the rows of all A, and all B in a block
diagonal matrix, so that ranks add up.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..families.huggingface_names import INPUTS_FIRST, MODULE_NAMES
from ..families.huggingface_regions import fused_modules
from . import peft_prompt
from .adapted_modules import linear_maps

Leaves = dict[str, np.ndarray]
PREFIX = "base_model.model."
OFT_SINCE = "0.18.0"  # the first version of PEFT that computes rotations by our series
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
    """A linear module in PEFT's files, and our maps that it fuses, in the order of its outputs."""

    name: str  # model.layers.7.self_attn.q_proj
    parts: tuple[str, ...]  # canonical names of our maps; one where nothing is fused
    inputs: int
    widths: tuple[int, ...]  # outputs of each part


def peft_modules(model: ModelConfig, kind: str) -> list[PeftModule]:
    """Every linear module of the blocks in files of format `kind`."""
    table, maps, modules = MODULE_NAMES[kind], linear_maps(model), []
    for layer in range(model.layers):
        for key in maps:
            keys = fused_modules(f"layers/{{}}/{key}", table)
            if keys[0] == f"layers/{{}}/{key}":
                sizes = [maps[part.removeprefix("layers/{}/")] for part in keys]
                widths = tuple(math.prod(outputs) for _, outputs in sizes)
                parts = tuple(part.format(layer) for part in keys)
                modules.append(PeftModule(table[keys[0]].format(layer), parts, math.prod(sizes[0][0]), widths))
    return modules


def to_peft(
    adapter: AdapterConfig,
    model: ModelConfig,
    *,
    kind: str,
    leaves: Mapping[str, Leaves],
    column_norms: Callable[[str], np.ndarray],
    base: str,
) -> tuple[dict[str, Any], Leaves]:
    """(adapter_config.json, tensors) of the adapters in `leaves` (by canonical module), sliced to their ranks.

    `column_norms` returns |W| over the inputs of a module, which DoRA needs for fused maps that it does not adapt.
    `base` is the path of the base model. Raises UserError for a method that PEFT has no format for.
    """
    if adapter.method in peft_prompt.PEFT_TYPES:
        return peft_prompt.prompt_to_peft(adapter, model, kind=kind, leaves=leaves, base=base)
    if adapter.method not in PEFT_TYPES:
        raise UserError(
            f"adapter.method: {adapter.method} has no format in PEFT; merge the adapter with `meshwright checkpoint "
            "export`"
        )
    adapted = [module for module in peft_modules(model, kind) if any(part in leaves for part in module.parts)]
    write = WRITERS.get(adapter.method, partial(lora_to_peft, column_norms=column_norms))
    tensors, settings = write(adapted, leaves, adapter)
    targets = short_target_names([module.name for module in adapted], peft_modules(model, kind))
    if "feedforward_modules" in settings:
        names = settings["feedforward_modules"]
        settings["feedforward_modules"] = [
            target for target in targets if any(name == target or name.endswith(f".{target}") for name in names)
        ]
    common = {
        "peft_type": PEFT_TYPES[adapter.method],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "fan_in_fan_out": kind in INPUTS_FIRST,
        "target_modules": targets,
    }
    return common | settings, {name: np.ascontiguousarray(array) for name, array in tensors.items()}


def short_target_names(names: list[str], all_modules: list[PeftModule]) -> list[str]:
    """Last parts of the names, `["q_proj", "v_proj"]`, where no other module has the same; else the full names."""
    short = sorted({name.rpartition(".")[2] for name in names})
    matched = sorted(module.name for module in all_modules if module.name.rpartition(".")[2] in short)
    return short if matched == sorted(names) else sorted(names)


def lora_to_peft(
    modules: list[PeftModule],
    leaves: Mapping[str, Leaves],
    adapter: AdapterConfig,
    column_norms: Callable[[str], np.ndarray],
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of LoRA and DoRA; less common ranks and alphas go into patterns."""
    tensors, ranks, alphas = {}, {}, {}
    for module in modules:
        parts = [leaves.get(part) for part in module.parts]
        scale = next(float(part["scale"][0]) for part in parts if part)
        # A module of the file has one scale: those of other parts are multiplied into their second factor.
        a = [part["a"].reshape(module.inputs, -1).T for part in parts if part]
        b = [
            part["b"].reshape(-1, width).T * (float(part["scale"][0]) / scale) if part else np.zeros((width, 0))
            for part, width in zip(parts, module.widths, strict=True)
        ]
        tensors[f"{PREFIX}{module.name}.lora_A.weight"] = np.concatenate(a).astype(np.float32)
        tensors[f"{PREFIX}{module.name}.lora_B.weight"] = block_diagonal(b).astype(np.float32)
        if adapter.method == "dora":
            magnitudes = [
                (part["magnitude"] if part else column_norms(name)).reshape(-1)
                for part, name in zip(parts, module.parts, strict=True)
            ]
            tensors[f"{PREFIX}{module.name}.lora_magnitude_vector"] = np.concatenate(magnitudes).astype(np.float32)
        rank = sum(len(rows) for rows in a)
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
        "rank_pattern": {re.escape(name): other for name, other in ranks.items() if other != rank},
        "alpha_pattern": {re.escape(name): as_integer(other) for name, other in alphas.items() if other != alpha},
    }


def as_integer(number: float) -> float | int:
    """`number` as an integer where it equals one to seven digits."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-7) else number


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    """A matrix with blocks [outputs, rank] on its diagonal and zeros elsewhere."""
    result = np.zeros((sum(len(block) for block in blocks), sum(block.shape[1] for block in blocks)))
    row = column = 0
    for block in blocks:
        result[row : row + len(block), column : column + block.shape[1]] = block
        row, column = row + len(block), column + block.shape[1]
    return result


def ia3_to_peft(
    modules: list[PeftModule], leaves: Mapping[str, Leaves], adapter: AdapterConfig
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of IA3; fused parts without an adapter have ones."""
    del adapter
    tensors, feedforward = {}, []
    for module in modules:
        parts = [leaves.get(part) for part in module.parts]
        if parts[0] is not None and "input_scale" in parts[0]:
            tensors[f"{PREFIX}{module.name}.ia3_l"] = parts[0]["input_scale"].reshape(1, -1)
            feedforward.append(module.name)
            continue
        vectors = [
            part["output_scale"].reshape(-1) if part else np.ones(width, np.float32)
            for part, width in zip(parts, module.widths, strict=True)
        ]
        tensors[f"{PREFIX}{module.name}.ia3_l"] = np.concatenate(vectors)[:, None]
    return tensors, {"feedforward_modules": feedforward, "init_ia3_weights": True}


def vera_to_peft(
    modules: list[PeftModule], leaves: Mapping[str, Leaves], adapter: AdapterConfig
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of VeRA; the shared matrices, `leaves[""]`, are sliced to the widest adapted map."""
    refuse_fused(modules, adapter)
    tensors = {}
    for module in modules:
        tensors[f"{PREFIX}{module.name}.vera_lambda_b"] = leaves[module.parts[0]]["vera_b"].reshape(-1)
        tensors[f"{PREFIX}{module.name}.vera_lambda_d"] = leaves[module.parts[0]]["vera_d"]
    inputs, outputs = max(module.inputs for module in modules), max(module.widths[0] for module in modules)
    tensors["base_model.vera_A"] = leaves[""]["a"][:inputs].T
    tensors["base_model.vera_B"] = leaves[""]["b"][:, :outputs].T
    return tensors, {
        "r": adapter.rank,
        "vera_dropout": adapter.dropout,
        "d_initial": 0.1,
        "projection_prng_key": 0,
        "save_projection": True,
        "bias": "none",
    }


def refuse_fused(modules: list[PeftModule], adapter: AdapterConfig) -> None:
    """Raise UserError where a module that the file fuses would need one adapter for all its parts."""
    if fused := next((module.name for module in modules if len(module.parts) > 1), None):
        raise UserError(
            f"adapter.method: {adapter.method} on {fused}, which the file fuses of maps that have an adapter each; "
            "merge the adapter with `meshwright checkpoint export`"
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
        "peft_version": OFT_SINCE,  # PEFT reads files without it by the older series
        "bias": "none",
    }


def adalora_to_peft(
    modules: list[PeftModule], leaves: Mapping[str, Leaves], adapter: AdapterConfig
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of AdaLoRA; PEFT multiplies by alpha / (rank + 1e-5), so e is corrected by that factor."""
    refuse_fused(modules, adapter)
    tensors = {}
    for module in modules:
        arrays, name = leaves[module.parts[0]], f"{PREFIX}{module.name}"
        tensors[f"{name}.lora_A"] = arrays["a"].reshape(module.inputs, -1).T
        tensors[f"{name}.lora_B"] = arrays["b"].reshape(-1, module.widths[0]).T
        tensors[f"{name}.lora_E"] = ((1 + 1e-5 / adapter.rank) * arrays["e"])[:, None].astype(np.float32)
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
        "total_step": adapter.budget.after + adapter.budget.settled + 1,  # required, but only training reads it
        "bias": "none",
    }


def shira_to_peft(
    modules: list[PeftModule], leaves: Mapping[str, Leaves], adapter: AdapterConfig
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and settings of SHiRA; indices [2, entries] are those of the weight [outputs, inputs]."""
    refuse_fused(modules, adapter)
    tensors = {}
    for module in modules:
        arrays = leaves[module.parts[0]]
        tensors[f"{PREFIX}{module.name}.shira_weight"] = arrays["values"]
        tensors[f"{PREFIX}{module.name}.shira_indices"] = arrays["indices"][::-1].astype(np.int32)
    return tensors, {"r": adapter.rank, "mask_type": "random", "random_seed": 0}


WRITERS = {
    "ia3": ia3_to_peft,
    "vera": vera_to_peft,
    "oft": oft_to_peft,
    "adalora": adalora_to_peft,
    "shira": shira_to_peft,
}  # the others are kinds of LoRA
