"""Bytes of process 0, broadcast to another process in chunks."""

import jax
import pytest
from jax.experimental import multihost_utils

from meshwright.parallel import multihost


@pytest.mark.parametrize("payload", [b"", b"abc", b"abcd", b"abcdefghij", None])
def test_bytes_are_the_same_on_every_process_for_any_number_of_chunks(payload, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "CHUNK_BYTES", 4)
    sent = []
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda array: sent.append(array) or array)
    assert multihost.broadcast_bytes(payload) == payload
    remaining = iter(sent)

    def receive(local):
        array = next(remaining)
        assert local.shape == array.shape and local.dtype == array.dtype  # a collective requires it
        return array

    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", receive)
    assert multihost.broadcast_bytes(None) == payload
    assert next(remaining, None) is None
