"""`meshwright bench interop`: logits of a tuned run next to those of PEFT and transformers, for the same tokens.

    meshwright bench interop BASE RUN

BASE is the model directory from which the run was tuned; RUN/adapter and RUN/merged were written by `adapter export`
and `adapter merge`. Without the extra `interop` it compares nothing and says so.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..configs.errors import MeshwrightError
from ..models.context import Context, no_constraint
from ..parallel import vocabulary
from ..parallel.state import combine
from ..train.infer.inference_session import inference_config, load_program
from .harness import bench_parser

ROWS, TOKENS = 4, 96
TOLERANCE = 1e-4  # of the largest logit; both sides round in float32
NEEDED = ("torch", "transformers", "peft")


def main(arguments: Sequence[str]) -> None:
    """Print the differences of the logits. Raises MeshwrightError if they are above `TOLERANCE`."""
    parser = bench_parser("interop", __doc__)
    parser.add_argument("base", type=Path, metavar="BASE")
    parser.add_argument("run", type=Path, metavar="RUN")
    options = parser.parse_args(arguments)
    base, run = options.base, options.run
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"nothing to compare with: {', '.join(missing)} not installed (extra `interop`)")
        return
    config = inference_config(run, [])
    tokens = np.random.default_rng(0).integers(0, config.model.vocab, (ROWS, TOKENS), dtype=np.int32)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    load_model = AutoModelForCausalLM.from_pretrained
    peers = {
        "PEFT, base and adapter": PeftModel.from_pretrained(load_model(base), run / "adapter"),
        "transformers, merged": load_model(run / "merged"),
    }
    logits = run_logits(run, tokens)
    for name, model in peers.items():
        expected = torch_logits(model, tokens)
        difference = np.abs(logits - expected).max() / np.abs(expected).max()
        same = (logits.argmax(-1) == expected.argmax(-1)).mean()
        print(f"{name}: logits {difference:.1e} apart of the largest, {100 * same:.1f} % the same likeliest token")
        if not difference < TOLERANCE:
            raise MeshwrightError(f"{name}: logits are {difference:.1e} apart, more than {TOLERANCE}")


def run_logits(run: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [rows, sequence, vocab] of the run's newest checkpoint."""
    program, state = load_program(inference_config(run, []), run)
    model = program.config.model

    @jax.jit
    def forward(params: dict) -> jax.Array:
        decoder = nnx.merge(program.graph, params)
        hidden, _ = decoder.hidden(tokens, Context(positions=jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape)))
        kernel = decoder.head_kernel(jnp.float32)
        return vocabulary.compute_logits(
            hidden, kernel, vocab=model.vocab, softcap=model.logit_softcap, constrain=no_constraint
        )

    return np.asarray(forward(combine(program.eval_params(state), state.frozen)))[..., : model.vocab]


def torch_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Logits [rows, sequence, vocab] of a PyTorch model in float32."""
    import torch

    with torch.no_grad():
        return model.float().eval()(torch.tensor(tokens.astype(np.int64))).logits.numpy()
