"""The cache of tokenized data: written once, complete or absent, and never used after a byte has changed."""

import errno
import logging
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from meshwright.configs.errors import UserError
from meshwright.train.data import encoding
from meshwright.train.data import token_store as module
from meshwright.train.data.disk_cache import cache_entry
from meshwright.train.data.token_store import tokenize
from meshwright.train.data.tokenizer import byte_tokenizer


class ListedDocuments(list):
    fingerprint = "listed"


TEXTS = ListedDocuments(["ab", "", "naïve", "line one\nline two\n" * 20])


def entry(cache):
    return next(path for path in (cache / "tokens").iterdir() if path.is_dir())


def documents_of(store):
    return [store.tokens[start:stop].tolist() for start, stop in zip(store.offsets, store.offsets[1:], strict=False)]


def test_documents_end_with_eos_and_empty_ones_are_left_out(cache):
    store = tokenize(TEXTS, byte_tokenizer(), cache=cache)
    assert documents_of(store) == [[*text.encode(), 256] for text in TEXTS if text]
    assert store.origins.tolist() == [0, 2, 3]
    assert store.sizes.tolist() == [2, 6, 360]
    assert store.lengths.tolist() == [3, 7, 361]
    assert store.tokens.dtype == np.uint16
    assert isinstance(store.tokens, np.memmap)


def test_long_texts_are_encoded_in_parts_of_whole_lines(cache, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 50)
    assert list(encoding.split_after_lines("a" * 49 + "\nb")) == ["a" * 49 + "\n", "b"]
    assert list(encoding.split_after_lines("c" * 120)) == ["c" * 50, "c" * 50, "c" * 20]
    store = tokenize(TEXTS, byte_tokenizer(), cache=cache)
    assert documents_of(store) == [[*text.encode(), 256] for text in TEXTS if text]


def test_documents_are_encoded_once_and_then_read(cache, monkeypatch):
    tokenize(TEXTS, byte_tokenizer(), cache=cache)
    monkeypatch.setattr(module, "write_store", lambda *_, **__: pytest.fail("encoded again"))
    assert len(tokenize(TEXTS, byte_tokenizer(), cache=cache)) == 3


def flip_a_bit(directory):
    content = bytearray((directory / "tokens.npy").read_bytes())
    content[-5] ^= 1
    (directory / "tokens.npy").write_bytes(content)


def cut_short(directory):
    content = (directory / "tokens.npy").read_bytes()
    (directory / "tokens.npy").write_bytes(content[:-2])


def lose_a_file(directory):
    (directory / "offsets.npy").unlink()


def lose_the_checksums(directory):
    (directory / "digests.json").write_text("")


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, lose_a_file, lose_the_checksums])
def test_a_damaged_entry_is_written_again_with_a_warning(damage, cache, caplog):
    expected = documents_of(tokenize(TEXTS, byte_tokenizer(), cache=cache))
    damage(entry(cache))
    with caplog.at_level(logging.WARNING):
        assert documents_of(tokenize(TEXTS, byte_tokenizer(), cache=cache)) == expected
    assert "writing it again" in caplog.text


def test_an_entry_that_fails_half_way_leaves_nothing(cache):
    class Breaks(ListedDocuments):
        def __getitem__(self, index):
            if index == 2:
                raise UserError("document 2 is broken")
            return super().__getitem__(index)

    with pytest.raises(UserError, match="document 2 is broken"):
        tokenize(Breaks(TEXTS), byte_tokenizer(), cache=cache)
    assert [path.suffix for path in (cache / "tokens").iterdir()] == [".lock"]


def test_a_full_disk_is_an_error_of_one_line(cache):
    def full(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"data\.cache: .* cannot be written: the disk is full; set data\.cache"):
        cache_entry(cache / "tokens" / "key", read=str, write=full)
    assert not list((cache / "tokens").glob("*.tmp"))


def test_a_cache_that_cannot_be_created_is_an_error_of_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache: .*cannot be written"):
        cache_entry(tmp_path / "file" / "key", read=str, write=lambda directory: None)


def test_one_of_many_threads_writes_an_entry(cache):
    written = []

    def write(directory):
        written.append(directory)
        (directory / "value").write_text("x")

    def want():
        cache_entry(cache / "key", read=lambda path: (path / "value").read_text(), write=write)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1


def test_after_a_process_is_killed_the_next_one_writes_its_entry(cache):
    code = (
        "import os, signal, sys; from pathlib import Path; from meshwright.train.data.disk_cache import cache_entry\n"
        "cache_entry(Path(sys.argv[1]), read=str, write=lambda directory: os.kill(os.getpid(), signal.SIGKILL))"
    )
    process = subprocess.run([sys.executable, "-c", code, str(cache / "key")], check=False, timeout=60)
    assert process.returncode == -signal.SIGKILL and (cache / "key.lock").exists()
    write = lambda directory: (directory / "value").write_text("x")
    assert cache_entry(cache / "key", read=lambda path: (path / "value").read_text(), write=write) == "x"
