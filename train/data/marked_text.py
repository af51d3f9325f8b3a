"""Examples as marked text: one string with prompts, learned text, and pairs of these.

    read + MARK + learned + MARK + read + ...           without marks the whole document is learned
    RENDERED + ...                                      a conversation, which is encoded at once, with special tokens
    first + SECOND + second                             a pair: two segments that stay in one row
    ... + LABEL + "1.0"                                 the label of the example, for its recipe

The spans of a text that is not rendered are encoded separately, so that a prompt has the same tokens as in generation.
Marks are code points that Unicode reserves for the internal use of programs.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ...configs.errors import UserError

MARK, RENDERED, SECOND, LABEL = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
MARKS = (MARK, RENDERED, SECOND, LABEL)


class Part(NamedTuple):
    """A text that becomes one segment of a row."""

    spans: tuple[str, ...]  # read, learned, read, learned, ...: the loss mask is 0, 1, 0, 1, ...
    rendered: bool  # by a chat template

    @property
    def text(self) -> str:
        return "".join(self.spans)

    @property
    def learned(self) -> str:
        return "".join(self.spans[1::2])


class Example(NamedTuple):
    """The content of a document."""

    parts: tuple[Part, ...]  # one, or the two of a pair
    label: float


def parse_document(document: str) -> Example:
    """The example in a document.

    >>> parse_document("all of it").parts[0].spans
    ('', 'all of it')
    """
    texts, _, label = document.partition(LABEL)
    return Example(tuple(_part(text) for text in texts.split(SECOND)), float(label or 0))


def write_document(parts: Sequence[Part], label: float = 0.0) -> str:
    """The document of an example: the inverse of `parse_document`."""
    texts = (RENDERED * part.rendered + MARK.join(part.spans) for part in parts)
    return SECOND.join(texts) + (f"{LABEL}{label}" if label else "")


def learned_text(document: str) -> str:
    """The learned text of a document."""
    return "".join(part.learned for part in parse_document(document).parts)


def plain_text(document: str) -> str:
    """The text of a document, without marks."""
    return "".join(part.text for part in parse_document(document).parts)


def make_part(prompt: str, completion: str, *, origin: str) -> Part:
    """A part with a prompt and a learned completion. Raises UserError where the completion is empty."""
    if not completion:
        raise UserError(
            f"data.field: {origin}: no text follows the prompt {prompt[-40:]!r}, so nothing is learned; repair or "
            "remove the row"
        )
    return Part((prompt, completion), rendered=False)


def check_unmarked(text: str, *, origin: str) -> str:
    """`text`. Raises UserError where it contains a mark."""
    for mark in MARKS:
        if mark in text:
            raise UserError(f"data.field: {origin} has the code point {mark!r}, which is reserved; remove it")
    return text


def _part(text: str) -> Part:
    rendered = text.startswith(RENDERED)
    spans = tuple(text.removeprefix(RENDERED).split(MARK))
    return Part(spans if len(spans) > 1 or rendered else ("", *spans), rendered)
