"""Prefixes, prompts and trained tokens in PEFT's format; `peft_writer.py` and `peft_reader.py` do the linear maps.

prefix             prompt_embeddings [length, layers x (k, v) x kv_heads x head_dim]
prompt, p-tuning   prompt_embeddings [length, embed]       the embeddings themselves, without the perceptron
tokens             base_model.model.EMBEDDING.trainable_tokens_delta [tokens, embed]    (rows, not a delta)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ..families.huggingface_names import MODULE_NAMES

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
    """(adapter_config.json, tensors) of `leaves` (by canonical module), for a base model of format `kind`."""
    common = {
        "peft_type": PEFT_TYPES[adapter.method],
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
    }
    if adapter.method == "tokens":
        embedding = MODULE_NAMES[kind]["embed"]
        target = embedding.rpartition(".")[2]
        config = {"target_modules": [target], "token_indices": adapter.tokens, "init_weights": True}
        return common | config, {TOKENS_TENSOR.format(embedding): np.asarray(leaves["embed/adapter"]["rows"])}
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
        layers = [leaves[f"layers/{layer}/attn/prefix"] for layer in range(model.layers)]
        arrays = [prefix[name].reshape(adapter.length, width) for prefix in layers for name in ("k", "v")]
        rows = np.concatenate(arrays, axis=1)
    else:
        refuse_scaled_embeddings(model)
        rows = leaves["prompt"]["rows"] if adapter.method == "prompt" else encode_prompt(leaves["prompt"])
    return common | config, {PROMPT_TENSOR: np.ascontiguousarray(rows, np.float32)}


def encode_prompt(encoder: Leaves) -> np.ndarray:
    """The embeddings [length, embed] that the perceptron of P-tuning computes."""
    hidden = np.maximum(encoder["seeds"] @ encoder["w1"] + encoder["b1"], 0)
    return np.maximum(hidden @ encoder["w2"] + encoder["b2"], 0) @ encoder["w3"] + encoder["b3"]


def refuse_scaled_embeddings(model: ModelConfig) -> None:
    """Raise UserError where PEFT does not define whether embeddings are scaled before or after the prompt is added."""
    if model.embedding_scale:
        raise UserError(
            "adapter.method: prompt and p-tuning are ambiguous in PEFT's files for a model with "
            "model.embedding_scale: true; use prefix"
        )


def prompt_from_peft(
    config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], model: ModelConfig, *, kind: str
) -> tuple[AdapterConfig, dict[str, Leaves]]:
    """(settings, leaves) of an adapter whose `peft_type` is in METHOD_BY_PEFT_TYPE.

    Raises UserError for tensors that do not fit the model.
    """
    method = METHOD_BY_PEFT_TYPE[config["peft_type"]]
    name = TOKENS_TENSOR.format(MODULE_NAMES[kind]["embed"]) if method == "tokens" else PROMPT_TENSOR
    if unexpected := sorted(tensors.keys() ^ {name}):
        raise UserError(
            f"adapter_model.safetensors: {', '.join(unexpected[:3])}: expected {name} and nothing else; export it again"
        )
    rows = tensors[name]
    width = 2 * model.layers * model.key_value_heads * model.head_width if method == "prefix" else model.embed
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UserError(
            f"adapter_model.safetensors: {name} is {rows.shape}, but this model has {width} columns; use the base "
            "model that the adapter was trained on"
        )
    if method == "tokens":
        tokens = config["token_indices"]
        if not isinstance(tokens, list) or len(tokens) != len(rows):
            raise UserError(
                f"adapter_config.json: token_indices: {tokens} do not name the {len(rows)} rows of {name}; export it "
                "again"
            )
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
