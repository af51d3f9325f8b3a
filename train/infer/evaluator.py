"""Evaluation of a state during training: held-out loss, answers to held-out questions, and generated samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ...parallel.state import TrainState
from ..data.assemble import Data
from ..engine.adapter_views import per_adapter
from ..engine.program import Program
from ..engine.replicas import Replicas
from .evaluation import evaluate
from .generation_eval import Metric, complete, evaluate_answers
from .sampling import Sampling


@dataclass(frozen=True)
class Evaluator:
    """Evaluates states of `program`; `compiled` is its compiled evaluation, `metrics` are the user's, of answers."""

    program: Program
    data: Data
    compiled: Callable[..., Any]
    metrics: Sequence[Metric] = ()

    def __call__(self, state: TrainState) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Return numbers by name, and (prompt, text) samples, for the parameters that the run would export."""
        params = self.program.eval_params(state)
        values = evaluate(self.program, self.compiled, params, state.frozen, self.data)
        if isinstance(self.program.replicas, Replicas):
            values |= self.program.replicas.replica_spread(state)
        scores, samples = self.generate(state)
        return values | scores, samples

    def generate(self, state: TrainState) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Return scores of the model's answers, and its samples; nothing if the run has several processes."""
        config, run_config = self.program.config.evaluation, self.program.config
        if not (config.prompts or config.answers) or jax.process_count() > 1:
            return {}, []
        values, samples = {}, []
        for prefix, program, adapter_state, data in per_adapter(self.program, state, self.data):
            weights = program.to_canonical_order(program.merged_weights(adapter_state))
            texts = complete(
                program,
                weights,
                data.tokenizer,
                config.prompts,
                template=data.template if run_config.all_data.has_conversations else None,
                max_tokens=config.sample_tokens,
                sampling=Sampling(temperature=config.temperature),
                seed=run_config.seed if run_config.privacy is None else 0,  # a private run's seed is a secret
            )
            scores = evaluate_answers(program, weights, data, config, self.metrics)
            values |= {f"{prefix}{name}": value for name, value in scores.items()}
            samples += [(f"{prefix}{prompt}", text) for prompt, text in zip(config.prompts, texts, strict=True)]
        return values, samples
