"""The verbs about drafts: what a target writes for its draft to learn, and speculative decoding by both. JAX-free."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ...configs import loader as loading
from ...configs.errors import UserError
from .arguments import Config, Json, Overrides, RunPath

PromptTokens = Annotated[int, typer.Option(help="What is read of a document without a prompt.", min=1)]


def continue_texts(
    config: Config,
    file: Annotated[Path, typer.Argument(help="Where rows of prompt and completion go, as JSON lines.")],
    overrides: Overrides = None,
    target: Annotated[Path | None, typer.Option(help="A run, or a model directory; default recipe.teacher.")] = None,
    texts: Annotated[int, typer.Option(help="How many, at most.", min=1)] = 1000,
    prompt_tokens: PromptTokens = 32,
    tokens: Annotated[int, typer.Option(help="Tokens to write, at most.", min=1)] = 192,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 1.0,
    seed: Annotated[int, typer.Option(help="A prompt and the seed decide its text.")] = 0,
) -> None:
    """Have a model continue the training documents of CONFIG: texts for its draft to learn."""
    loaded = loading.load_config(config, overrides=overrides or ())
    teacher = loaded.recipe.teacher
    if target is None and teacher is None:
        raise UserError(f"--target: nobody continues the documents of {config}; name a run or a model directory")
    from ..infer.draft_data import GenerationRequest, write_draft_data
    from ..infer.sampling import Sampling

    model_path = Path(teacher.origin) if target is None else target
    request = GenerationRequest(texts, prompt_tokens, tokens, Sampling(temperature=temperature), seed)
    counts = write_draft_data(loaded, model_path, file, request)
    how_ended = f"{counts.finished} ended, the others were cut after {tokens} tokens"
    typer.echo(f"{file}: {counts.written} texts by {model_path}; {how_ended}")


def speculate(
    run: RunPath,
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue; none: held-out ones.")] = None,
    target: Annotated[Path | None, typer.Option(help="A run, or a model directory; default the run's teacher.")] = None,
    ahead: Annotated[int, typer.Option(help="Tokens that are drafted for each pass of the target.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens to write after each.", min=1)] = 64,
    texts: Annotated[int, typer.Option(help="Held-out documents to begin with.", min=1)] = 16,
    prompt_tokens: PromptTokens = 32,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token.")] = 0.8,
    seed: Annotated[int, typer.Option(help="A prompt and the seed decide its text.")] = 0,
    as_json: Json = False,
) -> None:
    """Write by two models, the run's drafting for the target, and tell how much of the draft was kept."""
    from ..infer.draft_data import GenerationRequest, measure_draft
    from ..infer.sampling import Sampling

    request = GenerationRequest(texts, prompt_tokens, tokens, Sampling(temperature=temperature), seed)
    result, prompt_texts, continuations = measure_draft(
        Path(run), target, prompts or [], draft_length=ahead, request=request
    )
    if as_json:
        metrics: dict[str, Any] = {"acceptance": result.acceptance, "block_efficiency": result.block_efficiency}
        metrics |= {"tokens": result.tokens, "passes": result.passes, "ahead": ahead}
        pairs = [{"prompt": prompt, "text": text} for prompt, text in zip(prompt_texts, continuations, strict=True)]
        typer.echo(json.dumps(metrics | {"texts": pairs}, indent=1))
        return
    for prompt, text in zip(prompt_texts if prompts else (), continuations, strict=False):
        typer.echo(prompt + text)
    typer.echo(
        f"{result.tokens} tokens in {result.passes} passes of the target: {result.block_efficiency:.2f} tokens a pass; "
        f"it kept {100 * result.acceptance:.1f} % of what it read of the draft"
    )
