"""The names of our modules in transformers: one table a format, and nothing else about it.

    ours:   layers/7/attn/q          in files:  model.layers.7.self_attn.q_proj      ({} is the layer's number)

Modules of ours with the same name in files are fused there: their outputs follow each other in the table's order.
"""

from collections.abc import Mapping

LLAMA = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "score": "score",
    "layers/{}/attn_norm": "model.layers.{}.input_layernorm",
    "layers/{}/attn/q": "model.layers.{}.self_attn.q_proj",
    "layers/{}/attn/k": "model.layers.{}.self_attn.k_proj",
    "layers/{}/attn/v": "model.layers.{}.self_attn.v_proj",
    "layers/{}/attn/o": "model.layers.{}.self_attn.o_proj",
    "layers/{}/attn/q_norm": "model.layers.{}.self_attn.q_norm",
    "layers/{}/attn/k_norm": "model.layers.{}.self_attn.k_norm",
    "layers/{}/mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers/{}/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "layers/{}/mlp/up": "model.layers.{}.mlp.up_proj",
    "layers/{}/mlp/down": "model.layers.{}.mlp.down_proj",
}
# Llama's name for the norm before the MLP is Gemma 2's name for the norm after attention.
GEMMA2 = LLAMA | {
    "layers/{}/attn_post_norm": "model.layers.{}.post_attention_layernorm",
    "layers/{}/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "layers/{}/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
PHI3 = LLAMA | {
    "layers/{}/attn/q": "model.layers.{}.self_attn.qkv_proj",
    "layers/{}/attn/k": "model.layers.{}.self_attn.qkv_proj",
    "layers/{}/attn/v": "model.layers.{}.self_attn.qkv_proj",
    "layers/{}/mlp/gate": "model.layers.{}.mlp.gate_up_proj",
    "layers/{}/mlp/up": "model.layers.{}.mlp.gate_up_proj",
}
GPT2 = {
    "embed": "transformer.wte",
    "embed/positions": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "score": "score",
    "layers/{}/attn_norm": "transformer.h.{}.ln_1",
    "layers/{}/attn/q": "transformer.h.{}.attn.c_attn",
    "layers/{}/attn/k": "transformer.h.{}.attn.c_attn",
    "layers/{}/attn/v": "transformer.h.{}.attn.c_attn",
    "layers/{}/attn/o": "transformer.h.{}.attn.c_proj",
    "layers/{}/mlp_norm": "transformer.h.{}.ln_2",
    "layers/{}/mlp/up": "transformer.h.{}.mlp.c_fc",
    "layers/{}/mlp/down": "transformer.h.{}.mlp.c_proj",
}

# model_type -> table.
MODULE_NAMES: dict[str, Mapping[str, str]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2,
    "phi3": PHI3,
    "olmo2": GEMMA2,
    "gpt2": GPT2,
}

# model_type -> the class of transformers for reward models, which has a score in the place of the head.
SEQUENCE_CLASSIFIERS = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gemma": "GemmaForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "phi3": "Phi3ForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}

# Formats that store linear maps as [inputs, outputs]; the others store [outputs, inputs].
INPUTS_FIRST = {"gpt2"}
