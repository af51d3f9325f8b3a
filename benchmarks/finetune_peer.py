"""The peer of `meshwright bench finetune`: a LoRA step in transformers + PEFT, in an interpreter of its own.

    PYTHON finetune_peer.py '{"vocab": 8192, ...}'      for every line of input it does a step and prints its seconds

It imports nothing of this framework, so that any interpreter with torch, transformers and peft can run it.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def make_step(sizes: dict[str, Any]) -> Callable[[], float]:
    """Return a function that does a LoRA step and returns its seconds."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(sizes["threads"])
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=sizes["vocab"],
            hidden_size=sizes["embed"],
            intermediate_size=sizes["mlp"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["heads"],
            max_position_embeddings=sizes["sequence"],
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    model = get_peft_model(base, LoraConfig(r=sizes["rank"], lora_alpha=sizes["rank"], target_modules="all-linear"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    tokens = torch.randint(0, sizes["vocab"], (sizes["batch"], sizes["sequence"]))

    def step() -> float:
        began = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began

    return step


def main() -> None:
    """Do a step for each line of input."""
    step = make_step(json.loads(sys.argv[1]))
    for _ in sys.stdin:
        print(step(), flush=True)


if __name__ == "__main__":
    main()
