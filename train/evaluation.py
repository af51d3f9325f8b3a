"""Held-out loss, perplexity and bits per byte, and what `gzip -9` makes of the same bytes."""

import gzip
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax

from ..configs.run import RunConfig
from .data.assemble import Data
from .data.batches import batches
from .data.dataset import HeldOut
from .feed import local_rows, to_devices
from .program import Program
from .recipes.registry import RECIPES


def evaluate(program: Program, compiled: Callable[..., Any], params: Any, frozen: Any, data: Data) -> dict[str, float]:
    """held_out_loss of the held-out documents; of a recipe that counts tokens also _perplexity and _bits_per_byte.

    And where a teacher stands beside the model, held_out_acceptance: how often its speculative sampling, with the model
    as its draft, would take a token; of a reward model, held_out_accuracy. {} where nothing is held out.
    """
    if data.held_out is None:
        return {}
    loss = mean(program, compiled, params, frozen, data.held_out)
    values = {"held_out_loss": loss}
    for name, measure in program.compiled_measures.items():
        values[f"held_out_{name}"] = mean(program, measure, params, frozen, data.held_out)
    if RECIPES[program.config.recipe.name].unit != "token":
        return values
    bits = loss / math.log(2) * data.held_out.tokens / data.held_out.bytes
    return values | {"held_out_perplexity": math.exp(min(loss, 700.0)), "held_out_bits_per_byte": bits}


def mean(program: Program, compiled: Callable[..., Any], params: Any, frozen: Any, held_out: HeldOut) -> float:
    """The sums that `compiled` gives of a batch, added up over what is held out and divided."""
    numerator = weight = 0.0
    for batch in held_out_batches(program, held_out, program.config):
        part = jax.device_get(compiled(params, frozen, batch))
        numerator, weight = numerator + float(part[0]), weight + float(part[1])
    return numerator / max(weight, 1e-9)


def held_out_batches(program: Program, held_out: HeldOut, config: RunConfig) -> Iterable[dict[str, jax.Array]]:
    """The first `evaluation.batches` global batches of held-out rows, or all."""
    size = config.data.global_batch
    stop = held_out.padded_rows(size)
    if config.evaluation.batches is not None:
        stop = min(stop, config.evaluation.batches * size)
    rows = local_rows(config, program.mesh)
    for batch in batches(held_out, start=0, stop=stop, global_batch=size, rows=rows, prefetch=config.data.prefetch):
        yield to_devices(batch, config, program.mesh)


def gzip_bits_per_byte(held_out: HeldOut) -> float:
    """Bits per byte of `gzip -9` over the held-out documents, one after another."""
    text = "".join(held_out.texts()).encode()
    return 8 * len(gzip.compress(text, 9)) / len(text)
