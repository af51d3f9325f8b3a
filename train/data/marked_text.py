"""Examples: what the model reads, what it is to learn to say, and pairs of such texts. One string, cut at marks.

    read + MARK + learned + MARK + read + ...           no mark at all: the whole document is learned
    RENDERED + ...                                      a conversation: encoded whole, special tokens by their names
    first + SECOND + second                             a pair: two segments of one row, never apart
    ... + LABEL + "1.0"                                 what its recipe is told about the example

The parts of a text that is not rendered are encoded by themselves: a prompt has the tokens it has when a text is
continued from it. Marks are code points that Unicode keeps for the inside of programs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...configs.errors import UserError

MARK, RENDERED, SECOND, LABEL = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = (MARK, RENDERED, SECOND, LABEL)


class Part(NamedTuple):
    """One text that becomes one segment."""

    spans: tuple[str, ...]  # read, learned, read, learned, ...
    rendered: bool  # of a chat template

    @property
    def text(self) -> str:
        return "".join(self.spans)

    @property
    def learned(self) -> str:
        return "".join(self.spans[1::2])


class Example(NamedTuple):
    """What a document says."""

    parts: tuple[Part, ...]  # one, or the two of a pair
    label: float


def parse_document(document: str) -> Example:
    """The example in a document.

    >>> parsed("all of it").parts[0].spans
    ('', 'all of it')
    """
    texts, _, label = document.partition(LABEL)
    return Example(tuple(_part(text) for text in texts.split(SECOND)), float(label or 0))


def write_document(parts: Sequence[Part], label: float = 0.0) -> str:
    """The document of an example: the inverse of `parsed`."""
    texts = (RENDERED * part.rendered + MARK.join(part.spans) for part in parts)
    return SECOND.join(texts) + (f"{LABEL}{label}" if label else "")


def learned_text(document: str) -> str:
    """All the text of it that is learned."""
    return "".join(part.learned for part in parse_document(document).parts)


def plain_text(document: str) -> str:
    """All its text, without marks."""
    return "".join(part.text for part in parse_document(document).parts)


def make_part(prompt: str, completion: str, *, origin: str) -> Part:
    """A text that is learned, behind one that is not. Raises UserError where there is nothing to learn."""
    if not completion:
        raise UserError(
            f"data.field: {origin}: nothing follows the prompt {prompt[-40:]!r}, so nothing of it would be learned; "
            "repair or remove the row"
        )
    return Part((prompt, completion), rendered=False)


def check_unmarked(text: str, *, origin: str) -> str:
    """`text`. Raises UserError where it holds one of the marks."""
    for mark in MARKS:
        if mark in text:
            raise UserError(f"data.field: {origin} holds the code point {mark!r}, which no text may; remove it")
    return text


def _part(text: str) -> Part:
    rendered = text.startswith(RENDERED)
    spans = tuple(text.removeprefix(RENDERED).split(MARK))
    return Part(spans if len(spans) > 1 or rendered else ("", *spans), rendered)
