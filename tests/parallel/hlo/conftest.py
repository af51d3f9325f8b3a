"""Texts that libtpu printed, written by `make_fixtures.py`."""

from pathlib import Path

import pytest

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def printed():
    """Name of a fixture -> its text."""
    return {file.stem: file.read_text() for file in sorted(FIXTURES.glob("*.txt"))}
