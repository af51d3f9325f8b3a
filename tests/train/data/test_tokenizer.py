"""Tokenizers: decoding restores text, text never gives special tokens, and a saved tokenizer loads equal."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.configs.errors import UserError
from meshwright.configs.sections.data import TokenizerConfig
from meshwright.train.data.tokenizer import (
    byte_names,
    byte_tokenizer,
    check_vocab_size,
    configured_tokenizer,
    load_tokenizer,
    train_bpe,
)

CORPUS = ["the cat sat on the mat\n" * 5, "the dog sat on the log, naïve — 日本\n" * 5]
MAKERS = {"bytes": byte_tokenizer, "bpe": lambda: train_bpe(CORPUS, vocab=300)}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_decoding_restores_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x"])[0] == tokenizer.encode(text)


def test_text_cannot_spell_a_special_token(tokenizer):
    ids = tokenizer.encode("a<|endoftext|>b<|pad|>")
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids)
    assert tokenizer.decode([*ids, tokenizer.eos]) == "a<|endoftext|>b<|pad|>"
    assert tokenizer.decode_all([tokenizer.eos]) == "<|endoftext|>"


def test_bytes_are_their_own_ids():
    assert byte_tokenizer().encode("é\n") == list("é\n".encode())
    assert byte_tokenizer().vocab_size == 258
    assert len(set(byte_names())) == 256


def test_training_merges_frequent_pairs_up_to_its_size():
    trained = train_bpe(CORPUS, vocab=280)
    assert trained.vocab_size == 280
    assert len(trained.encode("the cat sat on the mat")) < 10
    assert train_bpe(CORPUS, vocab=5000).vocab_size < 5000, "there is not more to merge"


def test_training_is_the_same_in_another_process():
    code = f"from meshwright.train.data.tokenizer import train_bpe; print(train_bpe({CORPUS!r}, vocab=300).fingerprint)"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == train_bpe(CORPUS, vocab=300).fingerprint
    assert train_bpe(CORPUS[:1], vocab=300).fingerprint != train_bpe(CORPUS, vocab=300).fingerprint


def test_a_saved_tokenizer_loads_equal(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.encode("the cat <|endoftext|>") == tokenizer.encode("the cat <|endoftext|>")


def write_tokenizer(directory, tokens, config=None):
    """A tokenizer.json with the special `tokens` from id 256 on."""
    from tokenizers import Tokenizer, models

    library = Tokenizer(models.BPE(vocab={name: byte for byte, name in enumerate(byte_names())}, merges=[]))
    library.add_special_tokens(tokens)
    library.save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


ROLES = {
    "usual names": (["<s>", "</s>"], None, (256, 257, 257)),
    "one token for all": (["<|endoftext|>"], None, (256, 256, 256)),
    "named beside it": (["<a>", "<b>", "<c>"], {"eos_token": "<b>", "bos_token": {"content": "<c>"}}, (258, 257, 257)),
    "an unusual name wins": (["</s>", "<b>"], {"eos_token": "<b>", "pad_token": "</s>"}, (257, 257, 256)),
}


@pytest.mark.parametrize(("tokens", "config", "expected"), ROLES.values(), ids=ROLES)
def test_roles_of_a_foreign_tokenizer(tmp_path, tokens, config, expected):
    loaded = load_tokenizer(write_tokenizer(tmp_path, tokens, config))
    assert (loaded.bos, loaded.eos, loaded.pad) == expected
    loaded.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == loaded.fingerprint


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    with pytest.raises(UserError, match="no token that ends a document"):
        load_tokenizer(write_tokenizer(tmp_path, ["<x>"]))


def test_a_missing_or_invalid_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.tokenizer\.file: .* does not exist"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_the_model_must_have_a_row_for_every_id(tokenizer):
    check_vocab_size(tokenizer, tokenizer.vocab_size)
    with pytest.raises(UserError, match=f"model.vocab: 257 is less than the {tokenizer.vocab_size} ids"):
        check_vocab_size(tokenizer, 257)


def test_only_a_trained_tokenizer_needs_documents():
    assert configured_tokenizer(TokenizerConfig(train="bpe", vocab=300)) is None
    assert configured_tokenizer(TokenizerConfig(bytes=True)).vocab_size == 258
