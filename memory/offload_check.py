"""Check that offloading gives the right gradients on this device.

Some compilers returned wrong gradients, without an error, for scan residuals that were offloaded to the host
(openxla/xla#46231). So before a run uses an `offload` decision on a GPU, the gradients of a small stack of the same
kind of blocks are computed with and without it, in the same kind of loop as in the run. The run is refused if they
differ.
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
Gradient = Callable[[ModelConfig, Mapping[str, MemoryDecision] | None], Any]  # (model, decisions) -> gradient

BATCH, SEQUENCE = 2, 64
REPEATS = 4  # layers: a residual overwritten by that of another layer shows only in a loop
TOLERANCE = 0.02  # relative error: far above rounding in bfloat16, far below the effect of a wrong residual


def check_offload(
    model: ModelConfig, decisions: Mapping[str, MemoryDecision] | None, *, platform: str, gradient: Gradient
) -> None:
    """Raise MeshwrightError if the offloads among `decisions` change gradients on the first device of this machine.

    `decisions` come from `policy.tensor_decisions`; `gradient` is `scanned_gradient` or one with another loop over the
    layers. Does nothing if nothing is offloaded, or if `platform` is "cpu", which has only one kind of memory.
    """
    offloaded = sorted(name for name, decision in (decisions or {}).items() if decision == "offload")
    if not offloaded or platform == "cpu":
        return
    small = shrink_model(model)
    expected, actual = gradient(small, None), gradient(small, decisions)
    wrong = {name: error for name, error in relative_errors(expected, actual).items() if not error <= TOLERANCE}
    if wrong:
        name, error = max(wrong.items(), key=lambda item: item[1])
        raise MeshwrightError(
            f"memory: offloading {', '.join(offloaded)} gives wrong gradients on this device: the relative error of "
            f"{name} is {error:.2g} (openxla/xla#46231); use keep or recompute, or a JAX other than {jax.__version__}"
        )


def shrink_model(model: ModelConfig) -> ModelConfig:
    """Return a small model with the same kinds of blocks, scanned."""
    heads = 2 if model.key_value_heads < model.heads else 1
    sizes = {"vocab": 64, "vocab_multiple": 64, "embed": 64, "heads": heads, "kv_heads": 1, "head_dim": 64, "mlp": 128}
    layers = REPEATS * len(model.windows)
    return model.model_copy(update=sizes | {"layers": layers, "max_positions": SEQUENCE, "dropout": 0.0, "scan": True})


def scanned_gradient(
    model: ModelConfig, decisions: Mapping[str, MemoryDecision] | None, *, compute: Any, remat: Remat = make_remat
) -> Any:
    """Return the gradient of a fixed function of the last hidden state, in a scan over the layers.

    `compute`: dtype; `remat`: like `make_remat`, a parameter for the tests.
    """
    tokens, params = tokens_and_params(model)
    weights = np.random.default_rng(1).standard_normal((*tokens.shape, model.embed), np.float32)
    structure = decoder_graphdef(model)
    ctx = Context(
        positions=jnp.broadcast_to(jnp.arange(SEQUENCE), (BATCH, SEQUENCE)),
        remat=remat(decisions, scanned=True),
        compute_dtype=compute,
    )

    def loss(params: Any) -> jax.Array:
        hidden, _ = nnx.merge(structure, params).hidden(tokens, ctx)
        return (hidden.astype(jnp.float32) * weights).mean()

    return jax.jit(jax.grad(loss))(params)


def tokens_and_params(model: ModelConfig) -> tuple[np.ndarray, Any]:
    """Return tokens [batch, sequence] and random parameters, always the same."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
    tokens = random.integers(0, model.vocab, (BATCH, SEQUENCE))
    return tokens, jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32) * model.embed**-0.5, shapes)


def relative_errors(expected: Any, actual: Any) -> dict[str, float]:
    """Return path -> norm of the difference / norm of the expected array; NaN if either array has a NaN."""
    expected, actual = jax.device_get((expected, actual))
    relative = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / (np.linalg.norm(a) + 1e-30), expected, actual)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(error)
        for path, error in jax.tree_util.tree_leaves_with_path(relative)
    }
