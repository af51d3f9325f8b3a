"""Draft data: the target writes texts, the draft learns from them, and its acceptance is measured."""

import json

import jax
import numpy as np
import pytest
from support.equivalence import tiny
from typer.testing import CliRunner

from meshwright.checkpoint.interop import huggingface
from meshwright.configs.errors import UserError
from meshwright.configs.huggingface import to_config_json
from meshwright.configs.loader import dump_yaml, merge_trees
from meshwright.train.cli.main import app
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.data import assemble
from meshwright.train.data.tokenizer import configured_tokenizer
from meshwright.train.infer.draft_data import (
    GenerationRequest,
    document_prompts,
    held_out_prompts,
    measure_draft,
    write_draft_data,
)
from meshwright.train.infer.sampling import GREEDY
from meshwright.train.objectives.distillation import init_weights
from meshwright.train.run import train

FEW = GenerationRequest(texts=5, prompt_tokens=4, tokens=6, sampling=GREEDY, seed=0)
LINES = [f"{number} is {number * number} or so, they say" for number in range(60)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """The directory of a model with a byte tokenizer."""
    directory = tmp_path_factory.mktemp("target")
    config = tiny(model={"vocab": 264, "embed": 24}, seed=3)
    weights = jax.tree.map(lambda x: 3 * x, jax.jit(lambda: init_weights(config))())
    huggingface.write(weights, config.model, directory, kind="llama", limit=10**9)
    tree = to_config_json(config.model, positions=64, dtype="float32")
    (directory / "config.json").write_text(json.dumps(tree))
    configured_tokenizer(config.data.tokenizer).save(directory)
    return directory


def draft_config(directory, target, **changes):
    """The configuration of a draft of `target`, on lines of text in `directory`."""
    (directory / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    data = {"source": "jsonl", "path": str(directory / "lines.jsonl"), "held_out": 0.1, "sequence_length": 48}
    base = {
        "name": "draft",
        "steps": 2,
        "model": {"vocab": 264},
        "recipe": {"name": "distill", "teacher": {"from": str(target), "vocab_multiple": 8}},
        "data": data | {"packing": {"method": "best-fit"}},
        "logging": {"tensorboard": False},
    }
    return tiny(**merge_trees(base, changes))


def test_a_prompt_is_the_documents_own_or_its_first_tokens(tmp_path, target):
    rows = [{"prompt": f"{n}?", "completion": f" yes {n}"} for n in range(40)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with_prompts = {"path": str(tmp_path / "asked.jsonl"), "format": "prompt-completion", "held_out": 0.0}
    prompts_of = {}
    for name, data in (("texts", {"held_out": 0.0}), ("asked", with_prompts)):
        data = assemble.load_run_data(draft_config(tmp_path, target, data=data))
        prompts = list(document_prompts(data.train, data.tokenizer, rows=data.train.rows_per_epoch(0), tokens=4))
        assert {prompt[0] for prompt in prompts} == {data.tokenizer.bos}
        prompts_of[name] = sorted(data.tokenizer.decode(prompt[1:]) for prompt in prompts)
    assert prompts_of["texts"] == sorted(line[:4] for line in LINES)
    assert prompts_of["asked"] == sorted(row["prompt"] for row in rows)


@pytest.mark.slow
def test_a_draft_that_learns_its_targets_texts_is_accepted_more_often(tmp_path, target):
    config, file = draft_config(tmp_path, target), tmp_path / "texts.jsonl"
    counts = write_draft_data(config, target, file, FEW._replace(texts=40, tokens=12))
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == counts.written == 40 >= counts.finished
    assert all(any(line.startswith(row["prompt"]) for line in LINES) and row["completion"] for row in rows)
    with pytest.raises(UserError, match="nothing is overwritten"):
        write_draft_data(config, target, file, FEW)
    train(config, process_info=ProcessInfo(), root=tmp_path)
    before, *_ = measure_draft(tmp_path / "draft", None, [], draft_length=3, request=FEW)
    learning = {"optimizer": {"learning_rate": 0.01, "schedule": "constant", "weight_decay": 0.0}, "steps": 120}
    data = {"path": str(file), "format": "prompt-completion", "held_out": 0.0}
    train(
        draft_config(tmp_path, target, name="aligned", data=data, **learning), process_info=ProcessInfo(), root=tmp_path
    )
    prompts = [row["prompt"] for row in rows[:5]]
    after, begun_prompts, texts = measure_draft(tmp_path / "aligned", target, prompts, draft_length=3, request=FEW)
    assert begun_prompts == prompts and len(texts) == 5
    assert after.acceptance > before.acceptance + 0.2


@pytest.mark.slow
def test_the_verbs_continue_and_speculate(tmp_path, target, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = draft_config(tmp_path, target)
    (tmp_path / "mine.yaml").write_text(dump_yaml(config))
    words = ["data", "continue", "mine.yaml", "texts.jsonl", "--texts", "3", "--prompt-tokens", "4", "--tokens", "5"]
    output = CliRunner().invoke(app, words, catch_exceptions=False).output
    assert f"texts.jsonl: 3 texts by {target}" in output and "cut after 5 tokens" in output
    train(config, process_info=ProcessInfo(), root=tmp_path / "runs")
    words = ["speculate", "runs/draft", "12 is", "--tokens", "8", "--ahead", "2", "--temperature", "0"]
    output = CliRunner().invoke(app, words, catch_exceptions=False).output
    assert output.startswith("12 is") and "tokens a pass; it kept" in output
    result = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).output)
    assert 1 <= result["block_efficiency"] <= 3 and result["texts"][0]["prompt"] == "12 is"
    config = draft_config(tmp_path, target)
    assert len(held_out_prompts(config, tmp_path / "runs/draft", FEW)) == 5


def test_data_that_cannot_be_continued_is_refused(tmp_path, target):
    chats = draft_config(tmp_path, target, data={"format": "messages"})
    with pytest.raises(UserError, match="continues texts and no conversations"):
        write_draft_data(chats, target, tmp_path / "none.jsonl", FEW)
    with pytest.raises(UserError, match="lower --prompt-tokens"):
        write_draft_data(
            draft_config(tmp_path, target), target, tmp_path / "none.jsonl", FEW._replace(prompt_tokens=200)
        )
    assert not (tmp_path / "none.jsonl").exists()
    assert np.all([len(line) < 200 for line in LINES])
