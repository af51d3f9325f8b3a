"""Formats of fine-tuning data: one conversation in four formats is the same document; pairs stay together."""

import json

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.sections.data import FORMAT_COLUMNS, DataConfig
from meshwright.train.data import assemble
from meshwright.train.data.formats import FORMATS
from meshwright.train.data.tokenizer import byte_tokenizer

ASK, SAY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
SAID = "### User:\nWhy?\n\n### Assistant:\nSo.<|endoftext|>"
CONVERSATIONS = {
    "messages": {"messages": [ASK, SAY]},
    "messages in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, SAY]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    "alpaca": {"instruction": "Why?", "input": "", "output": "So."},
    "prompt-completion": {"prompt": [ASK], "completion": [SAY]},
}


def build(directory, rows, **settings):
    (directory / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    defaults = {"template": "plain", "packing": {"method": "best-fit"}, "sequence_length": 128, "held_out": 0.0}
    source = {"source": "jsonl", "path": str(directory / "rows.jsonl"), "tokenizer": {"bytes": True}}
    return assemble.build_data(DataConfig(**source, **(defaults | settings)), seed=0)


def shown_segments(row, *, only=None):
    """The targets of a row, or those for which `only` holds, as text."""
    mask = row["segment_ids"] > 0 if only is None else only
    return byte_tokenizer().decode_all(row["targets"][mask])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_same_example_in_every_format_gives_the_same_document(name, tmp_path, cache):
    row = build(tmp_path, [CONVERSATIONS[name]], format=name.split()[0]).train.row(0)
    assert shown_segments(row).rstrip("\n") == SAID
    assert shown_segments(row, only=row["loss_weights"] == 1) == "So.<|endoftext|>"


def test_the_formats_are_those_of_the_schema():
    assert list(FORMATS) == list(FORMAT_COLUMNS)


def test_columns_have_the_names_the_data_set_gives_them(tmp_path, cache):
    rows = [{"dialog": [ASK, SAY], "other": 1}]
    row = build(tmp_path, rows, format="messages", columns={"messages": "dialog"}).train.row(0)
    assert shown_segments(row, only=row["loss_weights"] == 1) == "So.<|endoftext|>"
    with pytest.raises(UserError, match=r"data.columns.messages.*dialogue matches nothing.*Did you mean dialog\?"):
        build(tmp_path, rows, format="messages", columns={"messages": "dialogue"})
    with pytest.raises(ValueError, match=r"data.columns: message .*messages, tools"):
        build(tmp_path, rows, format="messages", columns={"message": "dialog"})


PAIRS = [{"prompt": f"{n}?", "chosen": f" good {n}", "rejected": f" no {n}", "margin": n / 2} for n in range(5)]


@pytest.mark.parametrize("method", ["best-fit", "single"])
def test_a_pair_is_two_segments_of_one_row_the_better_first(tmp_path, cache, method):
    data = build(tmp_path, PAIRS, format="preference", packing={"method": method}, sequence_length=48)
    segments = {}
    for number in range(data.train.rows_per_epoch()):
        row = data.train.row(number)
        for first in range(1, row["segment_ids"].max(), 2):
            chosen, rejected = (row["segment_ids"] == segment for segment in (first, first + 1))
            segments[shown_segments(row, only=chosen), shown_segments(row, only=rejected)] = row["labels"][
                chosen | rejected
            ].tolist()
            assert row["positions"][rejected][0] == 0 and row["tokens"][rejected][0] == 256
            assert shown_segments(row, only=rejected & (row["loss_weights"] == 1)).startswith(" no")
    end = "<|endoftext|>"
    assert set(segments) == {(f"{n}? good {n}{end}", f"{n}? no {n}{end}") for n in range(5)}
    assert all(set(label) == {int(pair[0][0]) / 2} for pair, label in segments.items())


def test_chosen_and_rejected_messages_may_share_a_prompt(tmp_path, cache):
    pair = {"chosen": [ASK, SAY], "rejected": [ASK, {"role": "assistant", "content": "No."}]}
    row = build(tmp_path, [pair], format="preference").train.row(0)
    second = row["segment_ids"] == 2
    assert shown_segments(row, only=second & (row["loss_weights"] == 1)) == "No.<|endoftext|>"
    assert shown_segments(row, only=second).startswith("### User:\nWhy?")


def test_an_unpaired_answer_is_paired_with_the_next_answer(tmp_path, cache):
    rows = [{"prompt": f"{n}?", "completion": f" {n}!", "label": n == 0} for n in range(3)]
    data = build(tmp_path, rows, format="unpaired", packing={"method": "single"}, sequence_length=32)
    for number in range(3):
        row = data.train.row(number)
        own, other = (shown_segments(row, only=row["segment_ids"] == segment) for segment in (1, 2))
        n = int(own[0])
        assert own == f"{n}? {n}!<|endoftext|>" and other == f"{n}? {(n + 1) % 3}!<|endoftext|>"
        assert row["labels"][0] == (1 if n == 0 else -1)


def test_examples_longer_than_a_row_are_skipped_with_a_warning(tmp_path, cache, caplog):
    long = {"messages": [ASK, {"role": "assistant", "content": "x" * 200}]}
    rows = [{"messages": [ASK, SAY]}, long]
    data = build(tmp_path, rows, format="messages")
    assert data.train.rows_per_epoch() == 1 and "skipped 1 of 2 examples" in caplog.text
    with pytest.raises(UserError, match=r"data.sequence_length: 128 .* \d+"):
        build(tmp_path, [long], format="messages")


WRONG = {
    "no template": ({"messages": [ASK, SAY]}, {"template": None}, "data.template: null, and the tokenizer has no chat"),
    "no role": ({"messages": [{"content": "x"}]}, {}, "data.format: .* is not a message; write"),
    "no answer": ({"messages": [ASK]}, {}, "data.format: .*Rendered"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "data.format: .*image"),
    "unknown speaker": ({"conversations": [{"from": "humn"}]}, {"format": "sharegpt"}, "Did you mean human"),
    "no label": (
        {"prompt": "a", "completion": "b", "label": None},
        {"format": "unpaired"},
        "label None is neither true nor false",
    ),
    "texts without a prompt": ({"chosen": "a", "rejected": "b"}, {"format": "preference"}, "data.format: .*no prompt"),
    "half a chat": ({"prompt": "a", "completion": [SAY]}, {"format": "prompt-completion"}, "data.format: .*prompt 'a'"),
}


@pytest.mark.parametrize(("row", "settings", "message"), WRONG.values(), ids=WRONG)
def test_the_error_of_a_row_names_the_mistake(row, settings, message, tmp_path, cache):
    with pytest.raises(UserError, match=message):
        build(tmp_path, [row, row], **({"format": "messages"} | settings))


def test_conversations_are_never_cut(tmp_path, cache):
    with pytest.raises(ValueError, match=r"data.packing.method: concat cuts documents anywhere, and messages must"):
        build(tmp_path, [], format="messages", packing={"method": "concat"})


def test_weights_of_any_slice_equal_those_of_the_document(stores):
    store = stores([9, 8])
    object.__setattr__(store, "unlearned", np.array([[0, 5, 9], [2, 6, 16]]))
    whole = store.loss_mask(0, 17)
    assert whole.tolist() == [0, 0, 1, 1, 1, 0, 1, 1, 1, *[0] * 7, 1]
    assert store.learned.tolist() == [6, 1]
    for begin in range(17):
        for end in range(begin + 1, 18):
            np.testing.assert_array_equal(store.loss_mask(begin, end), whole[begin:end])
