"""Offload, checked on the device that will run it: its gradients must be those of the same blocks without it.

Some compilers returned silently wrong gradients for scan residuals offloaded to the host (openxla/xla#46231), and a
policy that changes numbers is worse than no policy. So before a run trusts a GPU with an `offload` decision, a small
stack of the run's kind of block is differentiated both ways, in the loop that the run will have, and the run is refused
where they differ.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..configs.errors import MeshwrightError
from ..configs.sections.base import MemoryDecision
from ..configs.sections.model import ModelConfig
from ..models.context import Context
from ..models.decoder import decoder_graphdef, initial_params
from .policy import make_remat

Remat = Callable[..., Callable[[Callable], Callable]]
Gradient = Callable[[ModelConfig, Mapping[str, MemoryDecision] | None], Any]  # under these decisions, by all parameters

BATCH, SEQUENCE = 2, 64
REPEATS = 4  # a residual that another layer's overwrote shows only in a loop of several
TOLERANCE = 0.02  # of a gradient's norm: far above what rounding in bfloat16 does, far below a wrong residual


def check_offload(
    model: ModelConfig, chosen: Mapping[str, MemoryDecision] | None, *, platform: str, gradient: Gradient
) -> None:
    """Raise MeshwrightError if offloading as `chosen` says changes gradients on this machine's first device.

    `chosen` comes from `policy.decisions`; `gradient` is `scanned_gradient`, or that of another loop over layers. Does
    nothing where nothing is offloaded, and on a CPU (`platform`), which has one kind of memory.
    """
    offloaded = sorted(name for name, decision in (chosen or {}).items() if decision == "offload")
    if not offloaded or platform == "cpu":
        return
    small = shrink_model(model)
    plain, moved = gradient(small, None), gradient(small, chosen)
    wrong = {name: error for name, error in relative_errors(plain, moved).items() if not error <= TOLERANCE}
    if wrong:
        name, error = max(wrong.items(), key=lambda item: item[1])
        raise MeshwrightError(
            f"memory: offloading {', '.join(offloaded)} gives wrong gradients on this device: {name} is off by "
            f"{error:.2g} of its norm (openxla/xla#46231); use keep or recompute, or another jax than {jax.__version__}"
        )


def shrink_model(model: ModelConfig) -> ModelConfig:
    """The same kind of blocks, few and small, scanned."""
    heads = 2 if model.key_value_heads < model.heads else 1
    sizes = {"vocab": 64, "vocab_multiple": 64, "embed": 64, "heads": heads, "kv_heads": 1, "head_dim": 64, "mlp": 128}
    layers = REPEATS * len(model.windows)
    return model.model_copy(update=sizes | {"layers": layers, "max_positions": SEQUENCE, "dropout": 0.0, "scan": True})


def scanned_gradient(
    model: ModelConfig, chosen: Mapping[str, MemoryDecision] | None, *, compute: Any, remat: Remat = make_remat
) -> Any:
    """Of a fixed function of the last hidden state. `remat` turns decisions into a wrapper; a test has another."""
    tokens, params = tokens_and_params(model)
    weights = np.random.default_rng(1).standard_normal((*tokens.shape, model.embed), np.float32)
    structure = decoder_graphdef(model)
    ctx = Context(
        positions=jnp.broadcast_to(jnp.arange(SEQUENCE), (BATCH, SEQUENCE)),
        remat=remat(chosen, scanned=True),
        compute_dtype=compute,
    )

    def loss(params: Any) -> jax.Array:
        hidden, _ = nnx.merge(structure, params).hidden(tokens, ctx)
        return (hidden.astype(jnp.float32) * weights).mean()

    return jax.jit(jax.grad(loss))(params)


def tokens_and_params(model: ModelConfig) -> tuple[np.ndarray, Any]:
    """Tokens [batch, sequence] and weights to differentiate by, the same every time."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
    tokens = random.integers(0, model.vocab, (BATCH, SEQUENCE))
    return tokens, jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32) * model.embed**-0.5, shapes)


def relative_errors(expected: Any, found: Any) -> dict[str, float]:
    """Path -> norm of the difference over the norm expected; NaN where either is."""
    expected, found = jax.device_get((expected, found))
    relative = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / (np.linalg.norm(a) + 1e-30), expected, found)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(error)
        for path, error in jax.tree_util.tree_leaves_with_path(relative)
    }
