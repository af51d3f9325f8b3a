"""Data for a draft model, written by its target model, and a measurement of how well the draft then drafts.

    write_draft_data(config, target, file, request)    # the target continues prompts from the documents of `config`
    measure_draft(draft, target, prompts, ...)         # speculative decoding, counted (`speculative.py`)

A model is named by its directory, either a run's or one of Hugging Face's. Source: FastDraft, arXiv:2411.11055,
section 3.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from ...configs.errors import UserError
from ...configs.run import RunConfig
from ...parallel.mesh import make_mesh
from ..core.process_env import ProcessInfo
from ..core.run_paths import newest_island
from ..data import assemble
from ..data.batches import RowSource
from ..data.tokenizer import Tokenizer, check_same_tokenizer, load_tokenizer
from ..engine import runtime
from ..engine.program import build
from .generate import generate
from .import_export import config_for
from .inference_session import inference_config, load_program
from .sampling import Sampling
from .speculative import LoadedModel, SpeculationResult, speculate

logger = logging.getLogger(__name__)
BATCH_ROWS = 32  # texts that are generated in one batch


class GenerationRequest(NamedTuple):
    """How many prompts to read and how much to generate for each."""

    texts: int  # prompts, at most
    prompt_tokens: int  # length of the prompt taken from a document that has none of its own
    tokens: int  # tokens to generate for a prompt, at most
    sampling: Sampling
    seed: int


class Counts(NamedTuple):
    """Numbers of texts."""

    written: int
    finished: int  # those that end with the end-of-document token, not at `GenerationRequest.tokens`


def load_model(directory: Path, *, platform: str) -> LoadedModel:
    """Load the model in `directory` onto one device of `mesh.platform`. Raises UserError if there is none."""
    if (directory / "config.json").is_file() and not (directory / "config.yaml").is_file():
        config = config_for(directory, mesh={"platform": platform, "devices": 1})
        runtime.start(config, ProcessInfo())
        program = build(config, make_mesh(config.mesh))
        return LoadedModel(program, program.pretrained_weights())
    run = newest_island(directory)
    program, state = load_program(inference_config(run, [f"mesh.platform={platform}"]), run)
    return LoadedModel(program, program.merged_weights(state))


def write_draft_data(config: RunConfig, target: Path, file: Path, request: GenerationRequest) -> Counts:
    """Continue prompts from the training documents of `config` with the model in `target`, and write rows to `file`.

    A row is a JSON object with `prompt` and `completion`. Raises UserError if `file` exists, or if the model has
    another tokenizer than the documents.
    """
    if file.exists():
        raise UserError(f"{file} exists; choose another name, nothing is overwritten")
    if config.data.has_conversations or config.adapters:
        kind = "several adapters" if config.adapters else f"conversations (data.format: {config.data.format})"
        raise UserError(f"{target} continues texts and no {kind}; set data.format to prompt-completion or text")
    model = load_model(target, platform=config.mesh.platform)
    data = assemble.load_run_data(config)
    tokenizer = data.tokenizer
    check_same_tokenizer(
        tokenizer, newest_island(target) if (target / "config.yaml").exists() else target, key="--target"
    )
    settings = {"max_tokens": request.tokens, "sampling": request.sampling, "eos": tokenizer.eos}
    length = request.prompt_tokens
    prompts = document_prompts(data.train, tokenizer, rows=data.train.rows_per_epoch(0), tokens=length)
    # A file of texts can hold a prompt only if its text gives the same tokens again and no character was cut.
    prompts = (ids for ids in prompts if list(tokenizer.encode_batch([tokenizer.decode(ids[1:])])[0]) == ids[1:])
    prompts = islice(prompts, request.texts)
    written = finished = 0
    with file.open("x", encoding="utf-8") as out:
        while batch := list(islice(prompts, BATCH_ROWS)):
            rows = generate(*model, batch, **settings, key=jax.random.key(request.seed))
            for prompt, row in zip(batch, rows, strict=True):
                if completion := tokenizer.decode(row):
                    out.write(json.dumps({"prompt": tokenizer.decode(prompt[1:]), "completion": completion}) + "\n")
                    written, finished = written + 1, finished + (len(row) < request.tokens)
            logger.info("%d texts", written)
    if not written:
        file.unlink()
        raise UserError(f"data: no training document has a prompt or over {length} tokens; lower --prompt-tokens")
    return Counts(written, finished)


def measure_draft(
    draft: Path, target: Path | None, prompts: Sequence[str], *, draft_length: int, request: GenerationRequest
) -> tuple[SpeculationResult, list[str], list[str]]:
    """Decode speculatively with both models; return the result, the prompts and their continuations.

    `target` None: the teacher of the draft's run. No `prompts`: prompts from held-out documents of that run.
    Raises UserError if there is no target, or if it has another tokenizer than the draft.
    """
    run = newest_island(draft)
    config = inference_config(run, [])
    if target is None:
        if config.recipe.teacher is None:
            raise UserError(f"--target: {run} has no recipe.teacher; name the model that it drafts for")
        target = Path(config.recipe.teacher.origin)
    tokenizer = load_tokenizer(run)
    check_same_tokenizer(
        tokenizer, newest_island(target) if (target / "config.yaml").exists() else target, key="--target"
    )
    prompt_ids = [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(list(prompts))]
    if not prompts:
        prompt_ids = held_out_prompts(config, run, request)
    result = speculate(
        load_model(target, platform=config.mesh.platform),
        load_model(run, platform=config.mesh.platform),
        prompt_ids,
        draft_length=draft_length,
        max_tokens=request.tokens,
        sampling=request.sampling,
        eos=tokenizer.eos,
        key=jax.random.key(request.seed),
    )
    decoded = [tokenizer.decode(prompt[1:]) for prompt in prompt_ids]
    return result, decoded, [tokenizer.decode(text) for text in result.texts]


def held_out_prompts(config: RunConfig, run: Path, request: GenerationRequest) -> list[list[int]]:
    """Token ids of prompts from at most `request.texts` held-out documents. Raises UserError if there are none."""
    data = assemble.load_run_data(config)
    if data.held_out is None:
        raise UserError(
            f"data.held_out: 0 in {run}: there are no prompts; give texts to continue, or set data.held_out=0.02"
        )
    length = request.prompt_tokens
    prompts = document_prompts(data.held_out, data.tokenizer, rows=data.held_out.rows, tokens=length)
    if not (prompts := list(islice(prompts, request.texts))):
        raise UserError(f"--prompt-tokens: {length}, and no held-out document of {run} is longer; lower it")
    return prompts


def document_prompts(dataset: RowSource, tokenizer: Tokenizer, *, rows: int, tokens: int) -> Iterator[list[int]]:
    """Yield a prompt, token ids with `bos` first, for each document in the first `rows` rows of `dataset`.

    A prompt is the leading part of a document that has no loss weight (as prompt-completion data has), else its first
    `tokens` tokens. Documents that are too short, and rests of documents that an earlier row begins, are left out.
    """
    for index in range(rows):
        row = dataset.row(index)
        for segment in range(1, int(row["segment_ids"].max(initial=0)) + 1):
            document = row["segment_ids"] == segment
            ids, trained = row["tokens"][document].tolist(), row["loss_weights"][document] > 0
            untrained = int(np.argmax(trained)) if trained.any() else len(ids)
            length = 1 + (untrained or tokens)
            if ids[0] == tokenizer.bos and length <= len(ids):
                yield ids[:length]
