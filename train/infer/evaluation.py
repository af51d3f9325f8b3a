"""Held-out loss, perplexity and bits per byte."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from ...configs.run import RunConfig
from ..data.assemble import Data
from ..data.batches import batches
from ..data.dataset import HeldOutDataset
from ..data.fixed_mixture import FixedHeldOutMixture
from ..engine.host_data import local_rows, make_global_arrays
from ..engine.program import Program
from ..objectives.registry import RECIPES


def evaluate(program: Program, compiled: Callable[..., Any], params: Any, frozen: Any, data: Data) -> dict[str, float]:
    """Return held_out_loss; if the loss is per token also held_out_perplexity and held_out_bits_per_byte.

    A model with a teacher has held_out_acceptance too: how often speculative sampling by the teacher would accept a
    token that the model drafts. A reward model has held_out_accuracy. With several adapters, names after the first are
    ADAPTER/held_out_... {} if nothing is held out.
    """
    if data.held_out is None:
        return {}
    measures = {"loss": compiled, **program.compiled_measures}
    # Each [2], numerator and weight; [2, adapters] with several adapters.
    sums = {name: np.zeros(()) for name in measures}
    for name, measure in measures.items():
        for batch in held_out_batches(program, data.held_out, program.config):
            sums[name] = sums[name] + np.stack(jax.device_get(measure(params, frozen, batch))).astype(np.float64)
    if not program.config.adapters:
        return held_out_metrics(program.config, sums, data.held_out)
    values = {"held_out_loss": mean(*sums["loss"].sum(axis=1))}
    for number, (name, held_out) in enumerate(data.held_out.datasets.items()):
        adapter_sums = {key: pair[:, number] for key, pair in sums.items()}
        metrics = held_out_metrics(program.config, adapter_sums, held_out)
        values |= {f"{name}/{key}": value for key, value in metrics.items()}
    return values


def held_out_metrics(config: RunConfig, sums: dict[str, np.ndarray], held_out: HeldOutDataset) -> dict[str, float]:
    """The metrics of `held_out` from (numerator, weight) of the loss and of other measures."""
    values = {f"held_out_{name}": mean(*pair) for name, pair in sums.items()}
    if RECIPES[config.recipe.name].unit != "token":
        return values
    loss = values["held_out_loss"]
    bits = loss / math.log(2) * held_out.tokens / held_out.bytes
    return values | {"held_out_perplexity": math.exp(min(loss, 700.0)), "held_out_bits_per_byte": bits}


def mean(numerator: float, weight: float) -> float:
    """Numerator over weight; 0 if both are 0."""
    return float(numerator / max(weight, 1e-9))


def held_out_batches(
    program: Program, held_out: HeldOutDataset | FixedHeldOutMixture, config: RunConfig
) -> Iterable[dict[str, jax.Array]]:
    """Yield the first `evaluation.batches` global batches of held-out rows; all if that is null."""
    size = config.data.global_batch
    stop = held_out.padded_rows(size)
    if config.evaluation.batches is not None:
        stop = min(stop, config.evaluation.batches * size)
    rows = local_rows(config, program.mesh)
    for batch in batches(held_out, start=0, stop=stop, global_batch=size, rows=rows, prefetch=config.data.prefetch):
        yield make_global_arrays(batch, config, program.mesh)
