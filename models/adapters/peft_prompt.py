"""Prefixes, prompts and trained tokens as PEFT keeps them: `peft.py` and `peft_reader.py` for what is in no linear map.

prefix             prompt_embeddings [length, layers x (k, v) x kv_heads x head_dim]
prompt, p-tuning   prompt_embeddings [length, embed]       the rows that a perceptron made, without it
tokens             base_model.model.EMBEDDING.trainable_tokens_delta [tokens, embed]       rows, despite their name
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..families.weight_names import MODULE_NAMES

Leaves = dict[str, np.ndarray]
PEFT_TYPES = {
    "prefix": "PREFIX_TUNING",
    "prompt": "PROMPT_TUNING",
    "p-tuning": "PROMPT_TUNING",
    "tokens": "TRAINABLE_TOKENS",
}
METHOD_BY_PEFT_TYPE = {
    "PREFIX_TUNING": "prefix",
    "PROMPT_TUNING": "prompt",
    "P_TUNING": "prompt",
    "TRAINABLE_TOKENS": "tokens",
}
PROMPT_TENSOR = "prompt_embeddings"
TOKENS_TENSOR = "base_model.model.{}.trainable_tokens_delta"


def prompt_to_peft(
    adapter: AdapterConfig, model: ModelConfig, *, kind: str, leaves: Mapping[str, Leaves], base: str
) -> tuple[dict[str, Any], Leaves]:
    """(adapter_config.json, tensors) of what is in `leaves`, by canonical module, for files of format `kind`."""
    common = {
        "peft_type": PEFT_TYPES[adapter.method],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if adapter.method == "tokens":
        place, own = MODULE_NAMES[kind]["embed"], leaves["embed/adapter"]
        config = {"target_modules": [place.rpartition(".")[2]], "token_indices": adapter.tokens, "init_weights": True}
        return common | config, {TOKENS_TENSOR.format(place): np.asarray(own["rows"])}
    config = {
        "num_virtual_tokens": adapter.length,
        "num_transformer_submodules": 1,
        "num_layers": model.layers,
        "num_attention_heads": model.heads,
        "token_dim": model.embed,
    }
    if adapter.method == "prefix":
        width = model.key_value_heads * model.head_width
        config |= {"token_dim": width, "num_attention_heads": model.key_value_heads, "prefix_projection": False}
        every = [leaves[f"layers/{layer}/attn/prefix"][name] for layer in range(model.layers) for name in ("k", "v")]
        rows = np.concatenate([one.reshape(adapter.length, width) for one in every], axis=1)
    else:
        refuse_scaled_embeddings(model)
        rows = leaves["prompt"]["rows"] if adapter.method == "prompt" else encode_prompt(leaves["prompt"])
    return common | config, {PROMPT_TENSOR: np.ascontiguousarray(rows, np.float32)}


def encode_prompt(encoder: Leaves) -> np.ndarray:
    """The rows that P-tuning's perceptron makes."""
    first = np.maximum(encoder["seeds"] @ encoder["w1"] + encoder["b1"], 0)
    return np.maximum(first @ encoder["w2"] + encoder["b2"], 0) @ encoder["w3"] + encoder["b3"]


def refuse_scaled_embeddings(model: ModelConfig) -> None:
    """Raise UserError where it is open whether rows are scaled before or behind the prompt."""
    if model.embedding_scale:
        raise UserError(
            "adapter.method: a prompt for a model that scales its embeddings (model.embedding_scale) has no one "
            "meaning in PEFT's files; use prefix"
        )


def prompt_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: ModelConfig, *, kind: str
) -> tuple[AdapterConfig, dict[str, Leaves]]:
    """Settings and leaves of an adapter whose `peft_type` is in READ. Raises UserError for what does not fit."""
    method = METHOD_BY_PEFT_TYPE[config["peft_type"]]
    name = TOKENS_TENSOR.format(MODULE_NAMES[kind]["embed"]) if method == "tokens" else PROMPT_TENSOR
    if left := sorted(tensors.keys() ^ {name}):
        raise UserError(f"adapter_model.safetensors: {', '.join(left[:3])}: expected {name} and nothing else")
    rows = tensors[name]
    width = 2 * model.layers * model.key_value_heads * model.head_width if method == "prefix" else model.embed
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UserError(f"adapter_model.safetensors: {name} is {rows.shape}, but this model asks for {width} columns")
    if method == "tokens":
        tokens = config["token_indices"]
        if not isinstance(tokens, list) or len(tokens) != len(rows):
            raise UserError(f"adapter_config.json: token_indices: {tokens} do not name the {len(rows)} rows of {name}")
        numbers = np.array(tokens, np.int32)
        return AdapterConfig(method="tokens", tokens=tokens), {"embed/adapter": {"rows": rows, "numbers": numbers}}
    adapter = AdapterConfig(method=method, length=len(rows))
    if method == "prompt":
        refuse_scaled_embeddings(model)
        return adapter, {"prompt": {"rows": rows}}
    parts = rows.reshape(len(rows), model.layers, 2, model.key_value_heads, model.head_width)
    return adapter, {
        f"layers/{layer}/attn/prefix": {"k": parts[:, layer, 0], "v": parts[:, layer, 1]}
        for layer in range(model.layers)
    }
