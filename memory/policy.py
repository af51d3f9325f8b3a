"""Memory policy: keep intermediate values for the backward pass, recompute them, or offload them to host memory.

A block names its intermediate values (`configs/names.py`), and the policy has a decision for each name. Unnamed values
(squares in a norm, masks, casts) are recomputed, unless everything is kept. Keep `attn_out` and `attn_lse`
together: the backward pass of attention reads both, and if one is missing it computes the scores again.
"""

from collections.abc import Callable, Collection, Mapping

import jax

from ..configs.errors import UserError
from ..configs.names import POLICY_TENSORS
from ..configs.sections.base import MemoryDecision
from ..configs.sections.model import ModelConfig
from ..configs.sections.parallel import MemoryConfig

# A preset recomputes what it does not name. `none` keeps everything; `minimal` keeps the results of matrix products.
PRESETS: dict[str, dict[str, MemoryDecision]] = {
    "none": {},
    "full": {},
    "attention-out": {"attn_out": "keep", "attn_lse": "keep"},
    "minimal": dict.fromkeys(("q", "k", "v", "attn_out", "attn_lse", "attn_proj", "mlp_gate", "mlp_up"), "keep"),
    "offload-block-in": {"block_in": "offload"},
}


def emitted_tensors(model: ModelConfig) -> tuple[str, ...]:
    """Return the names of the tensors that the blocks of `model` have, in order."""
    absent = {"mlp_gate"} if model.activation == "gelu" else set()
    absent |= {"mlp_norm"} if model.parallel_block else set()
    absent |= set() if model.pre_norms else {"attn_norm", "mlp_norm"}
    return tuple(name for name in POLICY_TENSORS if name not in absent)


def tensor_decisions(memory: MemoryConfig, *, tensors: Collection[str]) -> dict[str, MemoryDecision] | None:
    """Return name -> decision, for the `tensors` that the model has; None: keep everything, without `jax.checkpoint`.

    Raises UserError if `memory.names` has a name that the model does not have, which would have no effect.
    """
    if unknown := memory.names.keys() - set(tensors):
        raise UserError.no_match("memory.names", unknown, candidates=tensors)
    if memory.policy == "none" and not memory.names:
        return None
    preset = PRESETS[memory.policy] if memory.policy != "none" else dict.fromkeys(tensors, "keep")
    return {name: decision for name, decision in preset.items() if name in tensors} | memory.names


def make_remat(decisions: Mapping[str, MemoryDecision] | None, *, scanned: bool) -> Callable[[Callable], Callable]:
    """Return a function that wraps a block to save what `decisions` say. `scanned`: the block is the body of a scan."""
    if decisions is None:
        return lambda block: block
    kept_names = [name for name, decision in decisions.items() if decision == "keep"]
    offloaded_names = [name for name, decision in decisions.items() if decision == "offload"]
    if offloaded_names:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept_names,
            names_which_can_be_offloaded=offloaded_names,
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = jax.checkpoint_policies.save_only_these_names(*kept_names)
    # In a scan there is a barrier already; elsewhere XLA would merge the recomputation with the original (CSE).
    return lambda block: jax.checkpoint(block, policy=policy, prevent_cse=not scanned)
