"""Evaluation by generation: texts after prompts, and answers to held-out questions, scored by metrics.

A metric of the user's is a function named in `evaluation.metrics`, from a list of answers to numbers by name:

    def length(answers):        # [{"prompt": ..., "expected": ..., "answer": ...}, ...], texts
        return {"length": sum(len(item["answer"]) for item in answers) / len(answers)}
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from ...configs.errors import MeshwrightError, UserError
from ...configs.sections.training import EvaluationConfig
from ..data.assemble import Data
from ..data.chat import Template
from ..data.encoding import encode_parts
from ..data.tokenizer import Tokenizer
from ..engine.program import Program
from .generate import generate
from .sampling import GREEDY, Sampling

Metric = Callable[[list[dict[str, str]]], Mapping[str, float]]


def complete(
    program: Program,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    template: Template | None = None,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[str]:
    """Return the model's text after each prompt, up to `max_tokens` tokens or the end of the document.

    A prompt is the beginning of a document; with a chat template it is a user's message, which the assistant answers.
    Raises UserError as `generate` does.
    """
    if template is None:
        prompt_ids, eos = [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(list(prompts))], tokenizer.eos
    else:
        rendered = [template.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
        prompt_ids = [encoding.ids for encoding in tokenizer.encode_rendered(rendered)]
        eos = end_of_turn(template, tokenizer)
    key = jax.random.key(seed)
    texts = generate(program, params, prompt_ids, max_tokens=max_tokens, sampling=sampling, eos=eos, key=key)
    return [tokenizer.decode(ids) for ids in texts]


def end_of_turn(template: Template, tokenizer: Tokenizer) -> int:
    """The id of the token that ends an assistant's message."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (encoding,) = encode_parts(
        [template.render_with_loss_mask(messages, origin="a conversation of two words")], tokenizer
    )
    masked = {index for start, stop in encoding.loss_mask_zeros for index in range(start, stop)}
    return encoding.tokens[max(set(range(len(encoding.tokens))) - masked)]


def evaluate_answers(
    program: Program, params: Any, data: Data, config: EvaluationConfig, metrics: Iterable[Metric]
) -> dict[str, float]:
    """Answer `config.answers` held-out questions greedily; return held_out_exact_match and the user's metrics.

    An answer matches if every token is the expected one, the end included. {} if `config.answers` is 0.
    """
    if not config.answers or data.held_out is None:
        return {}
    prompts, expected = zip(*data.held_out.questions(config.answers), strict=True)
    ends = {ids[-1] for ids in expected}
    if len(ends) > 1:
        raise MeshwrightError(
            f"evaluation.answers: the expected answers end with {len(ends)} different tokens, and generation can stop "
            "at one only; set evaluation.answers=0"
        )
    key = jax.random.key(0)  # greedy: nothing is drawn
    length = max(map(len, expected))
    answers = generate(program, params, prompts, max_tokens=length, sampling=GREEDY, eos=ends.pop(), key=key)
    exact = [answer == ids[:-1] for answer, ids in zip(answers, expected, strict=True)]
    decode = data.tokenizer.decode
    texts = [
        {"prompt": decode(prompt), "expected": decode(ids), "answer": decode(answer)}
        for prompt, ids, answer in zip(prompts, expected, answers, strict=True)
    ]
    values = {"held_out_exact_match": sum(exact) / len(exact)}
    for metric in metrics:
        values |= validate_scores(metric, metric(texts))
    return values


def validate_scores(metric: Metric, values: Any) -> dict[str, float]:
    """Return the `values` of a user's metric as floats. Raises UserError unless all are finite and have names."""
    name = f"{metric.__module__}:{metric.__qualname__}"
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise UserError(f"evaluation.metrics: {name} returned {values!r:.60}; return e.g. {{'length': 3.0}}")
    try:
        scores = {key: float(value) for key, value in values.items()}
    except (TypeError, ValueError):
        raise UserError(f"evaluation.metrics: {name} returned {values!r:.60}; every value must be a number") from None
    if bad := [key for key, value in scores.items() if not math.isfinite(value)]:
        raise UserError(f"evaluation.metrics: {name} returned {scores[bad[0]]} as {bad[0]}; return finite numbers")
    return scores


def load_metrics(names: Sequence[str]) -> list[Metric]:
    """Import the functions that `names`, each module:function, name; modules may be in the working directory.

    Raises UserError if there is none of a name.
    """
    if names and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    metrics = []
    for name in names:
        module, _, function = name.partition(":")
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"evaluation.metrics: {name}: {error}; modules are looked up from {Path.cwd()}") from None
        if not callable(getattr(imported, function, None)):
            known = [key for key, value in vars(imported).items() if callable(value) and not key.startswith("_")]
            raise UserError.no_match(f"evaluation.metrics ({module})", [function], candidates=known)
        metrics.append(getattr(imported, function))
    return metrics
