"""What the backward pass finds again, and where: keep on the device, recompute, or offload to host memory.

A block names its intermediate values (`configs/names.py`); a policy decides for each. Unnamed values (squares of a
norm, masks, casts) are recomputed, unless everything is kept. `attn_out` is of use only with `attn_lse`: the backward
pass of attention reads both, and without one of them runs the scores again.
"""

from collections.abc import Callable, Collection, Mapping

import jax

from ..configs.errors import UserError
from ..configs.names import POLICY_TENSORS
from ..configs.sections.base import MemoryDecision
from ..configs.sections.model import ModelConfig
from ..configs.sections.parallel import MemoryConfig

# What a preset does not name is recomputed. `none` keeps everything, named or not; `minimal` what matrix products made.
PRESETS: dict[str, dict[str, MemoryDecision]] = {
    "none": {},
    "full": {},
    "attention-out": {"attn_out": "keep", "attn_lse": "keep"},
    "minimal": dict.fromkeys(("q", "k", "v", "attn_out", "attn_lse", "attn_proj", "mlp_gate", "mlp_up"), "keep"),
    "offload-block-in": {"block_in": "offload"},
}


def emitted_tensors(model: ModelConfig) -> tuple[str, ...]:
    """Names of the tensors that this model's blocks really emit, in order."""
    absent = {"mlp_gate"} if model.activation == "gelu" else set()
    absent |= {"mlp_norm"} if model.parallel_block else set()
    absent |= set() if model.pre_norms else {"attn_norm", "mlp_norm"}
    return tuple(name for name in POLICY_TENSORS if name not in absent)


def tensor_decisions(memory: MemoryConfig, *, tensors: Collection[str]) -> dict[str, MemoryDecision] | None:
    """Decision per tensor, of those the model emits (`tensors`); None: keep everything and wrap nothing.

    Raises UserError on a name the model does not emit: a policy must not silently do nothing.
    """
    if unknown := memory.names.keys() - set(tensors):
        raise UserError.no_match("memory.names", unknown, candidates=tensors)
    if memory.policy == "none" and not memory.names:
        return None
    preset = PRESETS[memory.policy] if memory.policy != "none" else dict.fromkeys(tensors, "keep")
    return {name: decision for name, decision in preset.items() if name in tensors} | memory.names


def make_remat(decisions: Mapping[str, MemoryDecision] | None, *, scanned: bool) -> Callable[[Callable], Callable]:
    """`wrap(block)` that computes the same and saves what `chosen` says. `scanned`: the block is a scan's body."""
    if decisions is None:
        return lambda block: block
    kept = [name for name, decision in decisions.items() if decision == "keep"]
    offloaded = [name for name, decision in decisions.items() if decision == "offload"]
    if offloaded:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept,
            names_which_can_be_offloaded=offloaded,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
    # A scan is a barrier already; elsewhere XLA would merge the recomputation with the original.
    return lambda block: jax.checkpoint(block, policy=policy, prevent_cse=not scanned)
