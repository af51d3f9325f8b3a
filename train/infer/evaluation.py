"""Held-out loss, perplexity and bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from ...configs.run import RunConfig
from ..data.assemble import Data
from ..data.batches import batches
from ..data.dataset import HeldOut
from ..data.fixed_mixture import DealtHeldOut
from ..engine.host_data import local_rows, make_global_arrays
from ..engine.program import Program
from ..objectives.registry import RECIPES


def evaluate(program: Program, compiled: Callable[..., Any], params: Any, frozen: Any, data: Data) -> dict[str, float]:
    """held_out_loss of the held-out documents; of a recipe that counts tokens also _perplexity and _bits_per_byte.

    And where a teacher stands beside the model, held_out_acceptance: how often its speculative sampling, with the model
    as its draft, would take a token; of a reward model, held_out_accuracy. {} where nothing is held out.
    """
    if data.held_out is None:
        return {}
    measures = {"loss": compiled, **program.compiled_measures}
    sums = {name: added(program, measure, params, frozen, data.held_out) for name, measure in measures.items()}
    if not program.config.adapters:
        return numbers(program.config, sums, data.held_out)
    values = {"held_out_loss": mean(*sums["loss"].sum(axis=1))}
    for number, (name, held_out) in enumerate(data.held_out.each.items()):
        own = numbers(program.config, {key: both[:, number] for key, both in sums.items()}, held_out)
        values |= {f"{name}/{key}": value for key, value in own.items()}
    return values


def numbers(config: RunConfig, sums: dict[str, np.ndarray], held_out: HeldOut) -> dict[str, float]:
    """What is told of `held_out` by the (numerator, weight) of the loss and of other measures."""
    values = {f"held_out_{name}": mean(*both) for name, both in sums.items()}
    if RECIPES[config.recipe.name].unit != "token":
        return values
    loss = values["held_out_loss"]
    bits = loss / math.log(2) * held_out.tokens / held_out.bytes
    return values | {"held_out_perplexity": math.exp(min(loss, 700.0)), "held_out_bits_per_byte": bits}


def mean(numerator: float, weight: float) -> float:
    """Their ratio."""
    return float(numerator / max(weight, 1e-9))


def added(
    program: Program, compiled: Callable[..., Any], params: Any, frozen: Any, held_out: HeldOut | DealtHeldOut
) -> np.ndarray:
    """[2], numerator and weight that `compiled` gives of batches, added up; [2, adapters] of several."""
    total = np.zeros(())
    for batch in held_out_batches(program, held_out, program.config):
        total = total + np.stack(jax.device_get(compiled(params, frozen, batch))).astype(np.float64)
    return total


def held_out_batches(
    program: Program, held_out: HeldOut | DealtHeldOut, config: RunConfig
) -> Iterable[dict[str, jax.Array]]:
    """The first `evaluation.batches` global batches of held-out rows, or all."""
    size = config.data.global_batch
    stop = held_out.padded_rows(size)
    if config.evaluation.batches is not None:
        stop = min(stop, config.evaluation.batches * size)
    rows = local_rows(config, program.mesh)
    for batch in batches(held_out, start=0, stop=stop, global_batch=size, rows=rows, prefetch=config.data.prefetch):
        yield make_global_arrays(batch, config, program.mesh)
