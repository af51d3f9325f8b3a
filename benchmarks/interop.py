"""A tuned run beside PEFT and transformers: the same tokens through all, and how far the logits are apart.

    meshwright bench interop BASE RUN

BASE is the model directory the run was tuned from; RUN/adapter and RUN/merged are what `adapter export` and `adapter
merge` wrote. Without the extra `interop` nothing is compared, and that is said.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..configs.errors import MeshwrightError
from ..models.context import Context, unconstrained
from ..parallel import vocabulary
from ..parallel.state import combine
from ..train.infer.inference_session import inference_config, load_program

ROWS, TOKENS = 4, 96
CLOSE = 1e-4  # of the largest logit; both sides round in float32
NEEDED = ("torch", "transformers", "peft")


def main(arguments: Sequence[str]) -> None:
    """Print how far the logits are apart. Raises MeshwrightError where they are not the same."""
    parser = argparse.ArgumentParser(
        prog="meshwright bench interop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("run", type=Path, metavar="RUN")
    options = parser.parse_args(arguments)
    base, run = options.base, options.run
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"nothing to compare with: {', '.join(missing)} not installed (extra `interop`)")
        return
    config = inference_config(run, [])
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, (ROWS, TOKENS), dtype=np.int32)
    ours = logits(run, tokens)
    theirs = {
        "PEFT, base and adapter": with_peft(base, run / "adapter", tokens),
        "transformers, merged": merged(run, tokens),
    }
    for name, found in theirs.items():
        apart = np.abs(ours - found).max() / np.abs(found).max()
        same = (ours.argmax(-1) == found.argmax(-1)).mean()
        print(f"{name}: logits {apart:.1e} apart of the largest, {100 * same:.1f} % the same likeliest token")
        if not apart < CLOSE:
            raise MeshwrightError(f"{name}: logits are {apart:.1e} apart, more than {CLOSE}")


def logits(run: Path, tokens: np.ndarray) -> np.ndarray:
    """[rows, sequence, vocab] of the run's newest checkpoint."""
    program, state = load_program(inference_config(run, []), run)
    model = program.config.model

    @jax.jit
    def forward(params: dict) -> jax.Array:
        decoder = nnx.merge(program.graph, params)
        hidden, _ = decoder.hidden(tokens, Context(positions=jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape)))
        kernel = decoder.head_kernel(jnp.float32)
        return vocabulary.compute_logits(
            hidden, kernel, vocab=model.vocab, softcap=model.logit_softcap, constrain=unconstrained
        )

    return np.asarray(forward(combine(program.eval_params(state), state.frozen)))[..., : model.vocab]


def with_peft(base: Path, adapter: Path, tokens: np.ndarray) -> np.ndarray:
    """The same of PEFT's model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return of_torch(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter), tokens)


def merged(run: Path, tokens: np.ndarray) -> np.ndarray:
    """The same of transformers' model."""
    from transformers import AutoModelForCausalLM

    return of_torch(AutoModelForCausalLM.from_pretrained(run / "merged"), tokens)


def of_torch(model, tokens: np.ndarray) -> np.ndarray:
    """Logits of a PyTorch model in float32."""
    import torch

    with torch.no_grad():
        return model.float().eval()(torch.tensor(tokens.astype(np.int64))).logits.numpy()
