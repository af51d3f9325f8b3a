"""How good a state is: held-out loss, answers to held-out questions, and samples of what the model writes."""

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
from .generation_eval import Metric, answered, complete
from .sampling import Sampling


@dataclass(frozen=True)
class Evaluator:
    """Judges states of `program`; `compiled` is its evaluation, `metrics` are the user's, of answers."""

    program: Program
    data: Data
    compiled: Callable[..., Any]
    metrics: Sequence[Metric] = ()

    def __call__(self, state: TrainState) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Numbers by name, and (prompt, text) samples, of the parameters that the run stands for."""
        params = self.program.eval_params(state)
        values = evaluate(self.program, self.compiled, params, state.frozen, self.data)
        if isinstance(self.program.replicas, Replicas):
            values |= self.program.replicas.replica_spread(state)
        measured, samples = self.written(state)
        return values | measured, samples

    def written(self, state: TrainState) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Measures of the model's answers, and its samples. Only where one process has it all."""
        config, everything = self.program.config.evaluation, self.program.config
        if not (config.prompts or config.answers) or jax.process_count() > 1:
            return {}, []
        values, samples = {}, []
        for prefix, program, own, data in per_adapter(self.program, state, self.data):
            weights = program.to_canonical_order(program.merged_weights(own))
            texts = complete(
                program,
                weights,
                data.tokenizer,
                config.prompts,
                template=data.template if everything.reads.chats else None,
                max_tokens=config.sample_tokens,
                sampling=Sampling(temperature=config.temperature),
                seed=everything.seed if everything.privacy is None else 0,  # samples would tell of a secret
            )
            found = answered(program, weights, data, config, self.metrics)
            values |= {f"{prefix}{name}": value for name, value in found.items()}
            samples += [(f"{prefix}{prompt}", text) for prompt, text in zip(config.prompts, texts, strict=True)]
        return values, samples
