"""What the model writes while it trains: after prompts, and in answer to held-out questions; and how good that is.

A user's measure is a function named in `evaluation.metrics`, of one list and to numbers by name:

    def length(answers):        # [{"prompt": ..., "expected": ..., "answer": ...}, ...], texts
        return {"length": sum(len(one["answer"]) for one in answers) / len(answers)}
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
from ..data.encoding import encoded
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
    """What the model writes after each prompt, up to `max_tokens` tokens or the end of the document.

    A prompt opens a document; with a chat template it is what a user says, and the assistant's turn is written. Raises
    as `generate`.
    """
    if template is None:
        opened, eos = [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(list(prompts))], tokenizer.eos
    else:
        said = [template.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
        opened, eos = [one.ids for one in tokenizer.encode_rendered(said)], end_of_turn(template, tokenizer)
    key = jax.random.key(seed)
    texts = generate(program, params, opened, max_tokens=max_tokens, sampling=sampling, eos=eos, key=key)
    return [tokenizer.decode(ids) for ids in texts]


def end_of_turn(template: Template, tokenizer: Tokenizer) -> int:
    """The token that ends what the assistant says."""
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (made,) = encoded([template.part(talk, origin="a conversation of two words")], tokenizer)
    read = {place for start, stop in made.unlearned for place in range(start, stop)}
    return made.tokens[max(place for place in range(len(made.tokens)) if place not in read)]


def answered(
    program: Program, params: Any, data: Data, config: EvaluationConfig, metrics: Iterable[Metric]
) -> dict[str, float]:
    """held_out_exact_match and the user's measures of likeliest answers to `config.answers` held-out questions.

    {} where none are asked for. An answer is exact where every token is the expected one, the end included.
    """
    if not config.answers or data.held_out is None:
        return {}
    asked = data.held_out.questions(config.answers)
    longest = max(len(expected) for _, expected in asked)
    ends = {expected[-1] for _, expected in asked}
    if len(ends) > 1:
        raise MeshwrightError(
            f"evaluation.answers: expected answers end in {len(ends)} different tokens; it is not known where one stops"
        )
    found = generate(
        program,
        params,
        [prompt for prompt, _ in asked],
        max_tokens=longest,
        sampling=GREEDY,
        eos=ends.pop(),
        key=jax.random.key(0),  # likeliest tokens: nothing is drawn
    )
    exact = [answer == expected[:-1] for answer, (_, expected) in zip(found, asked, strict=True)]
    decode = data.tokenizer.decode
    texts = [
        {"prompt": decode(prompt), "expected": decode(expected), "answer": decode(answer)}
        for answer, (prompt, expected) in zip(found, asked, strict=True)
    ]
    values = {"held_out_exact_match": sum(exact) / len(exact)}
    for metric in metrics:
        values |= numbers(metric, metric(texts))
    return values


def numbers(metric: Metric, values: Any) -> dict[str, float]:
    """What a user's measure returned. Raises UserError where it is not numbers by name."""
    name = f"{metric.__module__}:{metric.__qualname__}"
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise UserError(f"evaluation.metrics: {name} returned {values!r:.60}; return e.g. {{'length': 3.0}}")
    try:
        found = {key: float(value) for key, value in values.items()}
    except (TypeError, ValueError):
        raise UserError(f"evaluation.metrics: {name} returned {values!r:.60}, which are not all numbers") from None
    if bad := [key for key, value in found.items() if not math.isfinite(value)]:
        raise UserError(f"evaluation.metrics: {name} returned {found[bad[0]]} as {bad[0]}; return finite numbers")
    return found


def metric_functions(names: Sequence[str]) -> list[Metric]:
    """The functions `module:function` names; modules are also found in the working directory.

    Raises UserError where there is none.
    """
    if names and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found = []
    for name in names:
        module, _, function = name.partition(":")
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            raise UserError(f"evaluation.metrics: {name}: {error}; modules are looked up from {Path.cwd()}") from None
        if not callable(getattr(imported, function, None)):
            known = [key for key, value in vars(imported).items() if callable(value) and not key.startswith("_")]
            raise UserError.no_match(f"evaluation.metrics ({module})", [function], known=known)
        found.append(getattr(imported, function))
    return found
