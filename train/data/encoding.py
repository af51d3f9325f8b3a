"""Texts to tokens: what each segment of a document consists of, and which of it is learned."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from ...configs.errors import UserError
from .marked_text import Part
from .tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 22  # text encoded at once: bounds memory, which is ~100 bytes a token while the library encodes


class EncodedSegment(NamedTuple):
    """One segment as tokens."""

    opener: int  # what the first token is predicted from
    tokens: Sequence[int]  # the targets
    unlearned: list[tuple[int, int]]  # stretches of `tokens` that are read only


def encode_parts(parts: Sequence[Part], tokenizer: Tokenizer) -> Iterator[EncodedSegment]:
    """Each part as tokens: a text behind `bos`, closed by `eos`; a rendered conversation as it is.

    Raises UserError where a conversation would never end.
    """
    spans = [span for part in parts if not part.rendered for span in part.spans]
    texts = iter(encode_texts(spans, tokenizer))
    rendered = iter(tokenizer.encode_rendered([part.text for part in parts if part.rendered]))
    for part in parts:
        if part.rendered:
            yield encode_conversation(part, next(rendered), tokenizer)
        else:
            pieces = [next(texts) for _ in part.spans]
            bounds = [0, *accumulate(map(len, pieces))]
            read = [pair for pair in zip(bounds[:-1:2], bounds[1::2], strict=True) if pair[0] < pair[1]]
            yield EncodedSegment(tokenizer.bos, [*(token for piece in pieces for token in piece), tokenizer.eos], read)


def encode_conversation(part: Part, encoding: Any, tokenizer: Tokenizer) -> EncodedSegment:
    """A rendered conversation: its first token opens it. A token is learned where any character of it is."""
    bounds = np.cumsum([0, *map(len, part.spans)])
    starts, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    learned = np.zeros(len(starts), bool)
    for first, last in zip(bounds[1:-1:2], bounds[2::2], strict=True):
        learned |= (starts < last) & (stops > first)
    ends = np.flatnonzero(learned)
    if len(ends) and encoding.ids[ends[-1]] not in tokenizer.added_ids:
        raise UserError(
            f"data.template: what is learned ends with {encoding.tokens[ends[-1]]!r}, which is no special token, so "
            "the model would never learn to stop: the template must write the tokenizer's end of a turn inside what "
            f"the assistant says ({{% generation %}}). Rendered: {part.text[-400:]!r}"
        )
    flips = np.flatnonzero(np.diff(learned[1:], prepend=True, append=True)).tolist()  # the opener is no target
    return EncodedSegment(encoding.ids[0], encoding.ids[1:], list(zip(flips[::2], flips[1::2], strict=True)))


def encode_texts(batch: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each text. One longer than BATCH_CHARACTERS is cut after a line end and encoded piece by piece."""
    pieces = [list(split_after_lines(text)) for text in batch]
    ids = iter(tokenizer.encode_batch([piece for text in pieces for piece in text]))
    for text in pieces:
        yield [token for _ in text for token in next(ids)]


def split_after_lines(text: str) -> Iterator[str]:
    """`text` in pieces of at most BATCH_CHARACTERS, cut after a line end where there is one."""
    start = 0
    while len(text) - start > BATCH_CHARACTERS:
        cut = text.rfind("\n", start, start + BATCH_CHARACTERS) + 1 or start + BATCH_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]
