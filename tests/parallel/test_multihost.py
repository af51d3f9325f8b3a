"""What the first process says, heard by another one, in parts."""

import jax
import pytest
from jax.experimental import multihost_utils

from meshwright.parallel import multihost


@pytest.mark.parametrize("said", [b"", b"abc", b"abcd", b"abcdefghij", None])
def test_bytes_arrive_whole_however_many_parts_they_take(said, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "PART", 4)
    told = []
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda one: told.append(one) or one)
    assert multihost.broadcast_bytes(said) == said
    waiting = iter(told)

    def heard(own):
        arrived = next(waiting)
        assert own.shape == arrived.shape and own.dtype == arrived.dtype  # a collective asks for that
        return arrived

    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", heard)
    assert multihost.broadcast_bytes(None) == said
    assert next(waiting, None) is None
