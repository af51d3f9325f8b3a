"""How good a state is: held-out loss, answers to held-out questions, and samples of what the model writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ..parallel.state import TrainState
from .answering import Metric, answered, complete
from .data.assemble import Data
from .evaluation import evaluate
from .program import Program
from .replicas import Replicas
from .sampling import Sampling


@dataclass(frozen=True)
class Assessment:
    """Judges states of `program`; `compiled` is its evaluation, `metrics` are the user's, of answers."""

    program: Program
    data: Data
    compiled: Callable[..., Any]
    metrics: Sequence[Metric] = ()

    def __call__(self, state: TrainState) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Numbers by name, and (prompt, text) samples, of the parameters that the run stands for."""
        params = self.program.evaluated(state)
        values = evaluate(self.program, self.compiled, params, state.frozen, self.data)
        if isinstance(self.program.replicas, Replicas):
            values |= self.program.replicas.apart(state)
        measured, samples = self.written(state)
        return values | measured, samples

    def written(self, state: TrainState) -> tuple[dict[str, float], list[tuple[str, str]]]:
        """Measures of the model's answers, and its samples. Only where one process has it all."""
        config, everything = self.program.config.evaluation, self.program.config
        if not (config.prompts or config.answers) or jax.process_count() > 1:
            return {}, []
        weights = self.program.in_order(self.program.whole(state))
        texts = complete(
            self.program,
            weights,
            self.data.tokenizer,
            config.prompts,
            template=self.data.template if everything.data.chats else None,
            max_tokens=config.sample_tokens,
            sampling=Sampling(temperature=config.temperature),
            seed=everything.seed if everything.privacy is None else 0,  # samples would tell of a secret
        )
        values = answered(self.program, weights, self.data, config, self.metrics)
        return values, list(zip(config.prompts, texts, strict=True))
