"""The peer of `meshwright bench finetune`: a LoRA step in transformers + PEFT, in an interpreter of its own.

    PYTHON finetune_peer.py '{"vocab": 8192, ...}'      for every line of input it does a step and prints its seconds

It imports nothing of this framework, so that any interpreter with torch, transformers and peft can run it.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any


def make_llama(sizes: dict[str, Any]) -> Any:
    """A Llama of transformers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["embed"],
        intermediate_size=sizes["mlp"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes.get("kv_heads", sizes["heads"]),
        max_position_embeddings=sizes["sequence"],
        tie_word_embeddings=sizes.get("tied", False),
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def make_step(
    model: Any, optimizer: Any, tokens: Any, autocast: Callable[[], Any] = nullcontext
) -> Callable[[], float]:
    """Return a function that trains `model` on `tokens` for a step and returns its seconds."""

    def step() -> float:
        began = time.perf_counter()
        with autocast():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began

    return step


def make_lora_step(sizes: dict[str, Any]) -> Callable[[], float]:
    """Return a function that does a step of PEFT's LoRA and returns its seconds."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(sizes["threads"])
    lora = LoraConfig(r=sizes["rank"], lora_alpha=sizes["rank"], target_modules="all-linear")
    model = get_peft_model(make_llama(sizes), lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    return make_step(model, optimizer, torch.randint(0, sizes["vocab"], (sizes["batch"], sizes["sequence"])))


def main() -> None:
    """Do a step for each line of input."""
    step = make_lora_step(json.loads(sys.argv[1]))
    for _ in sys.stdin:
        print(step(), flush=True)


if __name__ == "__main__":
    main()
