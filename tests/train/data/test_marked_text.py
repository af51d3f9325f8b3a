"""Marked text: prompts have no loss, answers have."""

import json
from collections import Counter

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.sections.data import DataConfig
from meshwright.train.data import assemble
from meshwright.train.data.marked_text import MARK
from meshwright.train.data.tokenizer import byte_tokenizer

PAIRS = [("2+2=", "4"), ("Capital of France?", " Paris"), ("", "no prompt"), ("é", "ü" * 9)]


def build(directory, pairs, *, prompt="question", method="best-fit", **more):
    lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
    (directory / "pairs.jsonl").write_text("\n".join(lines))
    settings = {"source": "jsonl", "path": str(directory / "pairs.jsonl"), "field": "answer", "prompt": prompt}
    data = DataConfig(**settings, tokenizer={"bytes": True}, packing={"method": method}, sequence_length=24, **more)
    return assemble.build_data(data, seed=0)


@pytest.mark.parametrize("method", ["best-fit", "concat"])
def test_answers_and_their_ends_are_learned_and_nothing_else(tmp_path, cache, method):
    """In any packing, targets of weight 1 are the tokens of answers with their end; all targets are whole pairs."""
    train, tokenizer = build(tmp_path, PAIRS, method=method, held_out=0.0).train, byte_tokenizer()
    learned, read = Counter(), Counter()
    for number in range(train.rows_per_epoch()):
        row = train.row(number)
        learned.update(row["targets"][row["loss_weights"] == 1].tolist())
        read.update(row["targets"][row["segment_ids"] > 0].tolist())
    ends = Counter({tokenizer.eos: len(PAIRS)})
    assert learned == Counter(tokenizer.encode("".join(answer for _, answer in PAIRS))) + ends
    assert read == Counter(tokenizer.encode("".join(question + answer for question, answer in PAIRS))) + ends


def test_held_out_counts_are_those_of_learned_text(tmp_path, cache):
    data = build(tmp_path, PAIRS, held_out=0.5)
    texts = list(data.held_out.texts())
    assert texts and set(texts) < {answer for _, answer in PAIRS}
    assert data.held_out.bytes == sum(len(text.encode()) for text in texts)
    assert data.held_out.tokens == data.held_out.bytes + len(texts)
    weights = sum(data.held_out.row(number)["loss_weights"].sum() for number in range(data.held_out.rows))
    assert weights == data.held_out.tokens


def test_a_pair_with_nothing_to_learn_names_its_line(tmp_path, cache):
    with pytest.raises(UserError, match=r"data.field: .*pairs.jsonl line 2: .*'b'"):
        build(tmp_path, [("a", "x" * 30), ("b", "")], held_out=0.0)
    with pytest.raises(UserError, match=r"data.field: .*ufdd0"):
        build(tmp_path, [("a", f"x{MARK}")], held_out=0.0)
    with pytest.raises(UserError, match="query matches nothing"):
        build(tmp_path, PAIRS, prompt="query", held_out=0.0)
    with pytest.raises(ValueError, match=r"data.prompt: 'q' .*source text"):
        DataConfig(source="text", path=str(tmp_path), prompt="q")


def test_without_prompts_every_token_is_learned(tmp_path, cache):
    (tmp_path / "plain.jsonl").write_text(json.dumps({"text": "x" * 100}))
    plain = {"source": "jsonl", "path": str(tmp_path / "plain.jsonl"), "tokenizer": {"bytes": True}}
    data = assemble.build_data(DataConfig(**plain, sequence_length=24, held_out=0.0), seed=0)
    for number in range(data.train.rows_per_epoch()):
        row = data.train.row(number)
        np.testing.assert_array_equal(row["loss_weights"], row["segment_ids"] > 0)
