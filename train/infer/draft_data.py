"""A draft and its target: texts that the target wrote, for the draft to learn, and how well the draft then drafts.

    write(config, target, file)            # what the target makes of the beginnings of a configuration's documents
    measured(draft, target, prompts)       # speculative decoding, counted (`speculative.py`)

A model is named by its directory: a run's, or one of Hugging Face's. Source: FastDraft, arXiv:2411.11055, section 3.
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
from ...configs.loader import validated
from ...configs.run import RunConfig
from ...configs.sections.model import ModelConfig
from ...parallel.mesh import make_mesh
from ..core.process_env import ProcessInfo
from ..core.run_paths import newest_island
from ..data import assemble
from ..data.batches import HasRows
from ..data.tokenizer import Tokenizer, check_same, load
from ..engine import runtime
from ..engine.program import build
from .generate import generate
from .import_export import made_for
from .inference_session import opened, read
from .sampling import Sampling
from .speculative import Spoken, Writer, speculate

logger = logging.getLogger(__name__)
AT_ONCE = 32  # texts that are written beside each other


class GenerationRequest(NamedTuple):
    """How much is read and written."""

    texts: int  # at most
    prompt_tokens: int  # of a document in which nothing is a prompt
    tokens: int  # to write, at most
    sampling: Sampling
    seed: int


class Counts(NamedTuple):
    """What `write` wrote."""

    written: int
    finished: int  # of these, by themselves


def writer_at(place: Path, *, platform: str) -> Writer:
    """The model in `place`, on one device of `mesh.platform`. Raises UserError where there is none."""
    if (place / "config.json").is_file() and not (place / "config.yaml").is_file():
        model = ModelConfig.model_validate({"from": str(place.absolute())})
        length = min(256, made_for(model) or 256)
        mesh = {"platform": platform, "devices": 1}
        config = validated(
            {"model": {"from": str(place.absolute())}, "data": {"sequence_length": length}, "mesh": mesh}
        )
        runtime.start(config, ProcessInfo())
        program = build(config, make_mesh(config.mesh))
        return Writer(program, program.pretrained_weights())
    run = newest_island(place)
    program, state = opened(read(run, [f"mesh.platform={platform}"]), run)
    return Writer(program, program.merged_weights(state))


def write_draft_data(config: RunConfig, target: Path, file: Path, request: GenerationRequest) -> Counts:
    """Continue the beginnings of training documents of `config` with the model in `target`; rows go to `file`.

    A row has `prompt` and `completion`. A document that has a prompt begins with it, any other with its first tokens.
    Raises UserError where `file` exists, or the model has another tokenizer than the documents.
    """
    if file.exists():
        raise UserError(f"{file} exists; choose another name, nothing is overwritten")
    if config.data.chats or config.adapters:
        what = "several adapters" if config.adapters else f"conversations (data.format: {config.data.format})"
        raise UserError(f"{target} continues texts and no {what}; set data.format to prompt-completion or text")
    one = writer_at(target, platform=config.mesh.platform)
    data = assemble.of_run(config)
    check_same(data.tokenizer, newest_island(target) if (target / "config.yaml").exists() else target, key="--target")
    found = document_prompts(data.train, data.tokenizer, rows=data.train.rows_per_epoch(0), tokens=request.prompt_tokens)
    prompts, counts = whole(found, data.tokenizer), Counts(0, 0)
    with file.open("x", encoding="utf-8") as out:
        left = request.texts
        while some := list(islice(prompts, min(AT_ONCE, left))):
            left -= len(some)
            ended = completed(one, data.tokenizer, some, request)
            for prompt, text, _ in ended:
                out.write(json.dumps({"prompt": prompt, "completion": text}) + "\n")
            counts = Counts(counts.written + len(ended), counts.finished + sum(by_itself for *_, by_itself in ended))
            logger.info("%d texts", counts.written)
    if not counts.written:
        file.unlink()
        raise UserError(
            f"data: no training document has more than {request.prompt_tokens} tokens, or a prompt; lower --prompt-tokens"
        )
    return counts


def completed(
    one: Writer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], asked: GenerationRequest
) -> list[tuple[str, str, bool]]:
    """(prompt, what follows, whether it ended by itself) of the prompts after which something follows."""
    rows = generate(
        *one,
        prompts,
        max_tokens=asked.tokens,
        sampling=asked.sampling,
        eos=tokenizer.eos,
        key=jax.random.key(asked.seed),
    )
    texts = [tokenizer.decode(row) for row in rows]
    return [
        (tokenizer.decode(prompt[1:]), text, len(row) < asked.tokens)
        for prompt, row, text in zip(prompts, rows, texts, strict=True)
        if text
    ]


def measure_draft(
    draft: Path, target: Path | None, prompts: Sequence[str], *, draft_length: int, asked: GenerationRequest
) -> tuple[Spoken, list[str], list[str]]:
    """What speculative decoding took, what it continued, and what it wrote.

    `target` None: the teacher of the draft's run. No `prompts`: the beginnings of held-out documents of that run.
    Raises UserError where there is no target, or it has another tokenizer.
    """
    run = newest_island(draft)
    config = read(run, [])
    if target is None:
        if config.recipe.teacher is None:
            raise UserError(f"--target: {run} was not taught by another model; name the one it is to draft for")
        target = Path(config.recipe.teacher.origin)
    tokenizer = load(run)
    check_same(tokenizer, newest_island(target) if (target / "config.yaml").exists() else target, key="--target")
    opened_prompts = [[tokenizer.bos, *ids] for ids in tokenizer.encode_batch(list(prompts))]
    if not prompts:
        opened_prompts = held_out_prompts(config, run, asked)
    spoken = speculate(
        writer_at(target, platform=config.mesh.platform),
        writer_at(run, platform=config.mesh.platform),
        opened_prompts,
        ahead=draft_length,
        max_tokens=asked.tokens,
        sampling=asked.sampling,
        eos=tokenizer.eos,
        key=jax.random.key(asked.seed),
    )
    decoded = [tokenizer.decode(prompt[1:]) for prompt in opened_prompts]
    return spoken, decoded, [tokenizer.decode(text) for text in spoken.texts]


def held_out_prompts(config: RunConfig, run: Path, asked: GenerationRequest) -> list[list[int]]:
    """Of `asked.texts` held-out documents. Raises UserError where there are none."""
    data = assemble.of_run(config)
    if data.held_out is None:
        raise UserError(f"data.held_out: 0 in {run}: nothing to begin with; give texts to continue")
    found = document_prompts(data.held_out, data.tokenizer, rows=data.held_out.rows, tokens=asked.prompt_tokens)
    prompts = list(islice(found, asked.texts))
    if not prompts:
        raise UserError(
            f"--prompt-tokens: {asked.prompt_tokens}, and no held-out document of {run} is longer; lower it"
        )
    return prompts


def document_prompts(dataset: HasRows, tokenizer: Tokenizer, *, rows: int, tokens: int) -> Iterator[list[int]]:
    """What the documents in the first `rows` rows begin with: what is read only, or else their first `tokens` tokens.

    `bos` stands before them. Documents that are too short, and pieces of documents that began elsewhere, are left out.
    """
    for index in range(rows):
        row = dataset.row(index)
        for segment in range(1, int(row["segment_ids"].max(initial=0)) + 1):
            here = row["segment_ids"] == segment
            ids, learned = row["tokens"][here].tolist(), row["loss_weights"][here] > 0
            read = int(np.argmax(learned)) if learned.any() else len(ids)
            length = 1 + (read or tokens)
            if ids[0] == tokenizer.bos and length <= len(ids):
                yield ids[:length]


def whole(prompts: Iterator[list[int]], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Of `prompts` those that a text can hold: its tokens are these again, and no character was cut."""
    for prompt in prompts:
        (again,) = tokenizer.encode_batch([tokenizer.decode(prompt[1:])])
        if list(again) == prompt[1:]:
            yield prompt
