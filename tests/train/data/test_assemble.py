"""From the section data to samples, and corpora that are too small."""

import os
import subprocess
import sys

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.sections.data import DataConfig
from meshwright.train.data.assemble import build_data, training_texts
from meshwright.train.data.batches import batches
from meshwright.train.data.held_out_split import select_held_out, text_identity
from meshwright.train.data.preview import render

BYTES = {"bytes": True}
TINY = {"source": "synthetic", "documents": 40, "tokenizer": BYTES, "sequence_length": 32, "global_batch": 4}


def build(seed=0, **settings):
    return build_data(DataConfig(**TINY | settings), seed=seed)


def texts_of(row, tokenizer):
    """The segments of a row as text."""
    return [tokenizer.decode(row["targets"][row["segment_ids"] == s]) for s in range(1, row["segment_ids"].max() + 1)]


@pytest.mark.parametrize("packing", [{"method": "concat"}, {"method": "best-fit", "window": 7}])
@pytest.mark.parametrize("tokenizer", [BYTES, {"train": "bpe", "vocab": 300}])
def test_the_training_text_is_the_text_that_is_not_held_out(cache, packing, tokenizer):
    data = build(packing=packing, tokenizer=tokenizer, held_out=0.2, sequence_length=2048)
    rows = range(data.train.rows_per_epoch())
    trained = [text for index in rows for text in texts_of(data.train.row(index), data.tokenizer)]
    held_out = set(data.held_out.texts())
    assert 1 <= len(held_out) == data.held_out.documents == data.summary["held_out_documents"]
    assert not any(text in trained for text in held_out)
    assert sum(len(text.encode()) for text in trained) == data.summary["bytes"] - data.held_out.bytes
    assert data.held_out.bytes == sum(len(text.encode()) for text in held_out)


def test_a_tokenizer_is_trained_on_no_held_out_text():
    class Listed(list):
        fingerprint = "listed"

    documents = Listed(f"document {number}" for number in range(100))
    out = select_held_out([text_identity(text) for text in documents], fraction=0.3)
    texts = [text for text, hidden in zip(documents, out, strict=True) if not hidden]
    assert list(training_texts([documents], fraction=0.3)) == texts
    assert 0 < len(texts) < 100


def test_two_builds_give_the_same_batches_from_any_start(cache):
    first, second = build(), build()
    run = [batch["tokens"] for batch in batches(first.train, start=0, stop=24, global_batch=4, prefetch=2)]
    resumed = [batch["tokens"] for batch in batches(second.train, start=12, stop=24, global_batch=4, prefetch=2)]
    np.testing.assert_array_equal(run[3:], resumed)
    assert first.fingerprint == second.fingerprint
    assert (build(seed=1).train.row(0)["tokens"] != first.train.row(0)["tokens"]).any()


def test_held_out_batches_have_complete_rows(cache):
    data = build()
    stop = data.held_out.padded_rows(4)
    read = list(batches(data.held_out, start=0, stop=stop, global_batch=4, prefetch=1))
    assert sum(batch["loss_weights"].sum() for batch in read) == data.held_out.tokens
    assert {batch["tokens"].shape for batch in read} == {(4, 32)}


def test_a_mixture_mixes_texts_by_its_weights(cache, tmp_path):
    (tmp_path / "z.txt").write_text("z" * 31)  # with the end token, one row
    entries = [{"source": "synthetic", "documents": 40, "weight": 3}, {"source": "text", "path": str(tmp_path)}]
    data = build_data(DataConfig(mixture=entries, tokenizer=BYTES, sequence_length=32, held_out=0), seed=0)
    is_text = ["zzz" in texts_of(data.train.row(index), data.tokenizer)[0] for index in range(2048)]
    assert sum(is_text) == 512
    assert data.held_out is None


def test_a_text_held_out_of_one_source_is_trained_on_by_no_other(cache, tmp_path):
    """Of so few texts each source holds out the one of smallest identity; the second text is in both sources."""
    first, second, third, fourth = sorted("abcd", key=lambda letter: text_identity(letter * 40))
    for name, letters in (("one", [second, fourth]), ("two", [first, second, third])):
        (tmp_path / name).write_text("--".join(letter * 40 for letter in letters))
    entries = [{"source": "text", "path": str(tmp_path / name), "separator": "--"} for name in ("one", "two")]
    data = build_data(DataConfig(mixture=entries, tokenizer=BYTES, sequence_length=8, held_out=1e-6), seed=0)
    trained = {data.tokenizer.decode(data.train.row(index)["targets"])[:1] for index in range(200)}
    assert {text[0] for text in data.held_out.texts()} == {first, second}
    assert trained - {""} == {third, fourth}


SETTINGS_THAT_CHANGE_SAMPLES = {
    "sequence_length": 16,
    "held_out": 0.3,
    "documents": 39,
    "packing": {"window": 5},
    "tokenizer": {"train": "bpe", "vocab": 300},
}


@pytest.mark.parametrize(("key", "value"), SETTINGS_THAT_CHANGE_SAMPLES.items(), ids=SETTINGS_THAT_CHANGE_SAMPLES)
def test_the_fingerprint_follows_what_decides_the_samples(cache, key, value):
    assert build(**{key: value}).fingerprint != build().fingerprint
    assert build(global_batch=8, prefetch=1).fingerprint == build().fingerprint


TOO_LITTLE = {
    "less than a row": (["a b"], {"held_out": 0}, "data.sequence_length: 32 .* 4 "),
    "one document to split": (["a" * 100], {}, "data.held_out: 0.02 "),
    "no text": (["", ""], {}, r"data.path: .* no documents"),
}


@pytest.mark.parametrize(("texts", "settings", "message"), TOO_LITTLE.values(), ids=TOO_LITTLE)
def test_too_little_text_is_refused(cache, tmp_path, texts, settings, message):
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        build(source="text", documents=None, path=str(tmp_path / "*.txt"), **settings)


def test_a_table_of_empty_texts_is_refused(cache, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    with pytest.raises(UserError, match=r"data: .*empty"):
        build(source="jsonl", documents=None, path=str(tmp_path))


def test_the_model_is_checked_against_the_tokenizer(cache):
    with pytest.raises(UserError, match=r"model\.vocab: 100"):
        build_data(DataConfig(**TINY), seed=0, model_vocab=100)


def test_preview_shows_documents_and_colours(cache):
    data = build(packing={"method": "best-fit"}, sequence_length=512)
    text = render(data, rows=2)
    assert "row 1: " in text.plain
    assert "▌1 " in text.plain
    assert "<|endoftext|>" in text.plain
    assert {"green", "bold cyan"} <= {str(span.style) for span in text.spans}


def test_the_data_path_needs_no_jax(tmp_path):
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax"):
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
from meshwright.configs.sections.data import DataConfig
from meshwright.train.data.assemble import build_data, training_texts
from meshwright.train.data.batches import batches
from meshwright.train.data.preview import render
from meshwright.train.data.held_out_split import select_held_out, text_identity
data = build_data(DataConfig(**{TINY!r}, cache={str(tmp_path)!r}), seed=0)
print(render(data).plain[:5], next(batches(data.train, start=0, global_batch=4, prefetch=2))["tokens"].shape)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert process.stdout.strip() == "row 0 (4, 32)", process.stderr
