"""Small token stores without a tokenizer: document d is 100 (d + 1), 100 (d + 1) + 1, ... and the end token 1."""

import numpy as np
import pytest

from meshwright.train.data.dataset import Packing
from meshwright.train.data.rows import RowShape
from meshwright.train.data.token_store import TokenStore

BOS, EOS, PAD = 2, 1, 0


def make_store(lengths):
    """A store whose document d has `lengths[d]` < 100 tokens, the end token included; all others are unique."""
    documents = [np.append(100 * (d + 1) + np.arange(length - 1), EOS) for d, length in enumerate(lengths)]
    count = np.arange(len(lengths))
    return TokenStore(
        tokens=np.concatenate(documents).astype(np.uint16),
        offsets=np.cumsum([0, *lengths]),
        identities=count.astype(np.uint64),
        openers=np.full((len(lengths), 2), BOS),
        cuts=np.asarray(lengths, np.int64),
        unlearned=np.zeros((2, 0), np.int64),
        labels=np.zeros(len(lengths), np.float32),
        sizes=4 * np.asarray(lengths),
        origins=count,
    )


@pytest.fixture(scope="session")
def stores():
    """The maker of stores."""
    return make_store


@pytest.fixture(scope="session")
def packings():
    """The maker of packings: rows of 8 tokens, from windows of 3 documents."""
    return lambda method="concat": Packing(method, 3, RowShape(8, pad=PAD))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory, also by default."""
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
