"""Makes the fixtures beside it, once, with PyTorch and transformers: tiny random models and the logits they give.

    python tests/models/families/make_fixtures.py        # needs torch and transformers; not run by the tests

Every parameter is perturbed, for a one or a zero hides a mistake; rows are longer than every window. Each directory is
what `save_pretrained` writes, and `expected.safetensors` with tokens [1, 48] and float32 logits [1, 48, vocab] of the
model in float64.
"""

import copy
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent / "fixtures"
SIZES = {
    "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 20, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
TIED = SIZES | {"tie_word_embeddings": True}
NO_HEAD_DIM = {key: value for key, value in SIZES.items() if key != "head_dim"}


def turn(kind="default", theta=50.0, **settings):
    """Rotations with wavelengths short enough to matter on short rows."""
    return {"rope_type": kind, "rope_theta": theta, **settings}


LLAMA3 = turn("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LINEAR = turn("linear", factor=2.0)
YARN = turn("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.2)
BOTH = {"full_attention": turn("linear", factor=8.0), "sliding_attention": turn(theta=10.0)}

CASES = {
    "llama2": ("LlamaConfig", {**NO_HEAD_DIM, "num_key_value_heads": 4, "rope_parameters": turn()}),
    "llama3": ("LlamaConfig", {**SIZES, "rope_parameters": LLAMA3}),
    "llama-biases": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True, "rope_parameters": turn()}),
    "smollm": ("LlamaConfig", {**NO_HEAD_DIM, "tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 5, "rope_parameters": turn()}),
    "qwen2": ("Qwen2Config", {**NO_HEAD_DIM, "rope_parameters": turn()}),
    "qwen2-windows": (
        "Qwen2Config",
        {**NO_HEAD_DIM, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        | {"rope_parameters": turn()},
    ),
    "qwen3": ("Qwen3Config", {**SIZES, "rope_parameters": YARN}),
    "gemma": ("GemmaConfig", {**TIED, "rope_parameters": turn()}),
    "gemma2": (
        "Gemma2Config",
        {**TIED, "num_hidden_layers": 3, "sliding_window": 5, "query_pre_attn_scalar": 16, "rope_parameters": turn()}
        | {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 1.5},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**TIED, "num_hidden_layers": 7, "sliding_window": 5, "query_pre_attn_scalar": 16, "rope_parameters": BOTH},
    ),
    "phi3": ("Phi3Config", {**NO_HEAD_DIM, "sliding_window": 5, "pad_token_id": 0, "rope_parameters": turn()}),
    "olmo2": ("Olmo2Config", {**NO_HEAD_DIM, "rope_parameters": turn(), "pad_token_id": 0}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_inner": 20, "n_positions": 64},
    ),
}  # fmt: skip


def random_model(case: str, *, seed: int) -> torch.nn.Module:
    """The model of a case; every parameter is perturbed."""
    torch.manual_seed(seed)
    config, settings = CASES[case]
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**settings), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def main() -> None:
    """Write every fixture; `qwen2` in bfloat16, `phi3` in several files."""
    for number, name in enumerate(CASES):
        model, half = random_model(name, seed=number), name == "qwen2"
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16() if half else parameter)
            saved = copy.deepcopy(model).to(torch.bfloat16 if half else torch.float32)
            saved.save_pretrained(HERE / name, max_shard_size="5KB" if name == "phi3" else "5GB")
            tokens = torch.randint(0, 61, (1, 48))
            logits = model.double()(tokens).logits.float()
        save_file({"tokens": tokens.int(), "logits": logits.contiguous()}, HERE / name / "expected.safetensors")
        (HERE / name / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
