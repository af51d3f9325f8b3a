"""Sources: the same documents from every format, and a one-line error for every mistake in a file."""

import json

import pytest

from meshwright.configs.errors import UserError
from meshwright.configs.sections.data import SourceConfig
from meshwright.train.data.sources import SOURCES, open_source

TEXTS = ["first", "second, naïve", "third 日本"]


def write_text(directory):
    for number, text in enumerate(TEXTS):
        (directory / f"{number}.txt").write_text(text, encoding="utf-8")
    return {"source": "text", "path": str(directory)}


def write_cut_text(directory):
    (directory / "all.txt").write_text("\n\n".join([TEXTS[0], "", *TEXTS[1:]]), encoding="utf-8")
    return {"source": "text", "path": str(directory / "all.txt"), "separator": "\n\n"}


def write_jsonl(directory):
    lines = [json.dumps({"text": text, "other": 1}) for text in TEXTS]
    (directory / "a.jsonl").write_text("\n".join(lines[:2]) + "\n\n", encoding="utf-8")
    (directory / "b.jsonl").write_text(lines[2], encoding="utf-8")
    return {"source": "jsonl", "path": str(directory)}


def write_parquet(directory):
    import pyarrow
    import pyarrow.parquet

    for name, texts in (("a", TEXTS[:2]), ("b", TEXTS[2:])):
        table = pyarrow.table({"text": texts, "other": [1] * len(texts)})
        pyarrow.parquet.write_table(table, directory / f"{name}.parquet")
    return {"source": "parquet", "path": str(directory / "*.parquet")}


def write_arrow(directory):
    import pyarrow

    table = pyarrow.table({"text": TEXTS, "other": [1, 2, 3]})
    with pyarrow.OSFile(str(directory / "a.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return {"source": "arrow", "path": str(directory / "a.arrow")}


def write_hf(directory):
    import datasets

    splits = {"train": datasets.Dataset.from_dict({"text": TEXTS, "other": [1, 2, 3]})}
    datasets.DatasetDict(splits).save_to_disk(str(directory / "saved"))
    return {"source": "hf", "path": str(directory / "saved")}


WRITERS = {
    "text": write_text,
    "text with a separator": write_cut_text,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "hf": write_hf,
}


def open_documents(settings, cache):
    return open_source(SourceConfig(**settings), key="data", cache=cache)


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_every_format_gives_the_same_documents(writer, tmp_path, cache):
    documents = open_documents(writer(tmp_path), cache)
    assert [documents[index] for index in range(len(documents))] == TEXTS


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_the_fingerprint_follows_the_content(writer, tmp_path, cache, monkeypatch):
    (tmp_path / "one").mkdir()
    settings = writer(tmp_path / "one")
    before = open_documents(settings, cache).fingerprint
    assert open_documents(settings, cache).fingerprint == before
    (tmp_path / "two").mkdir()
    monkeypatch.setattr(f"{__name__}.TEXTS", [*TEXTS[:2], "third changed"])
    assert open_documents(writer(tmp_path / "two"), cache).fingerprint != before


def test_the_writers_cover_every_kind_of_file():
    assert {name.split()[0] for name in WRITERS} == set(SOURCES) - {"stdlib", "synthetic", "docstrings"}


def test_the_standard_library_is_there(cache):
    documents = open_documents({}, cache)
    assert len(documents) > 0
    assert "import" in "".join(documents[index] for index in range(min(len(documents), 20)))


def test_synthetic_documents_are_a_function_of_their_index(cache):
    many, few = (
        open_documents({"source": "synthetic"}, cache),
        open_documents({"source": "synthetic", "documents": 3}, cache),
    )
    assert (len(many), len(few)) == (1000, 3)
    assert [many[index] for index in range(3)] == [few[index] for index in range(3)]
    assert many[0] != many[1]


def test_only_the_first_documents(tmp_path, cache):
    settings = write_text(tmp_path)
    documents = open_documents(settings | {"documents": 2}, cache)
    assert [documents[0], documents[1], len(documents)] == [*TEXTS[:2], 2]
    assert documents.fingerprint != open_documents(settings, cache).fingerprint


def read_all(settings, cache):
    documents = open_documents(settings, cache)
    return [documents[index] for index in range(len(documents))]


BAD_LINES = {
    "not JSON": (b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2, column \d+: not JSON"),
    "not an object": (b'{"text": "a"}\n\n3\n', r"data\.path: .*a\.jsonl line 3: int"),
    "no such column": (b'{"texts": "a"}\n', r"data\.field .*line 1\): text matches nothing.*Did you mean texts\?"),
    "no text in it": (b'{"text": null}\n', r"data\.field: text of .*line 1 is None, not text"),
    "half a character": (b'{"text": "ab\\ud800"}\n', r"line 1 is not Unicode text: character 2"),
    "not UTF-8": (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl is not UTF-8: byte 24 is 0xff"),
    "nothing": (b"\n\n", r"data\.path: .* no documents"),
}


@pytest.mark.parametrize(("content", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(content, message, tmp_path, cache):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_all({"source": "jsonl", "path": str(tmp_path)}, cache)


def test_text_that_is_not_utf8_names_file_and_byte(tmp_path, cache):
    (tmp_path / "a.txt").write_bytes(b"good--b\xe9d")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8: byte 7 is 0xe9"):
        read_all({"source": "text", "path": str(tmp_path), "separator": "--"}, cache)


MISSING = {
    "file": ("none.txt", "matches no file"),
    "glob": ("*.md", "matches no file"),
    "files in a directory": ("", "has no files"),
}


@pytest.mark.parametrize(("path", "message"), MISSING.values(), ids=MISSING)
def test_a_path_without_files_is_refused(path, message, tmp_path, cache):
    with pytest.raises(UserError, match=rf"data\.path: .*{message}"):
        open_documents({"source": "text", "path": str(tmp_path / path)}, cache)


def test_hidden_files_are_not_documents(tmp_path, cache):
    settings = write_text(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"\xff")
    assert read_all(settings, cache) == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_of_another_format_is_refused(kind, tmp_path, cache):
    (tmp_path / f"a.{kind}").write_text("not a table")
    with pytest.raises(UserError, match=f"is not {kind}: .*check data.source"):
        open_documents({"source": kind, "path": str(tmp_path)}, cache)


@pytest.mark.parametrize("writer", [write_parquet, write_hf])
def test_a_missing_column_lists_what_there_is(writer, tmp_path, cache):
    with pytest.raises(
        UserError, match=r"data\.field: txt matches nothing; there are other, text\. Did you mean text\?"
    ):
        open_documents(writer(tmp_path) | {"field": "txt"}, cache)


def test_a_saved_data_set_without_rows_is_refused(tmp_path, cache):
    import datasets

    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"data\.path: .* no documents"):
        open_documents({"source": "hf", "path": str(tmp_path / "saved")}, cache)


def test_a_missing_split_or_data_set_is_refused(tmp_path, cache):
    with pytest.raises(UserError, match=r"data\.split: trian matches nothing; there are train"):
        open_documents(write_hf(tmp_path) | {"split": "trian"}, cache)
    with pytest.raises(UserError, match=r"data\.path: .*none cannot be loaded"):
        open_documents({"source": "hf", "path": str(tmp_path / "none")}, cache)
