"""Encodes the parts of documents: the tokens of each segment, and its loss mask: which of them count in the loss."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from ...configs.errors import UserError
from .marked_text import Part
from .tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 22  # encoded at once; bounds memory, because the library needs ~100 bytes per token


class EncodedSegment(NamedTuple):
    """The tokens of one segment."""

    opener: int  # the input from which the first token is predicted
    tokens: Sequence[int]  # the targets
    loss_mask_zeros: list[tuple[int, int]]  # (start, stop) in `tokens`: where the loss mask is 0; elsewhere it is 1


def encode_parts(parts: Sequence[Part], tokenizer: Tokenizer) -> Iterator[EncodedSegment]:
    """Encode each part: a text between `bos` and `eos`, a rendered conversation unchanged.

    Raises UserError where the last learned token of a conversation does not end a turn.
    """
    texts = iter(encode_texts([span for part in parts if not part.rendered for span in part.spans], tokenizer))
    rendered = iter(tokenizer.encode_rendered([part.text for part in parts if part.rendered]))
    for part in parts:
        if part.rendered:
            yield encode_conversation(part, next(rendered), tokenizer)
        else:
            spans = [next(texts) for _ in part.spans]
            bounds = [0, *accumulate(map(len, spans))]
            zeros = [pair for pair in zip(bounds[:-1:2], bounds[1::2], strict=True) if pair[0] < pair[1]]
            yield EncodedSegment(tokenizer.bos, [*(token for span in spans for token in span), tokenizer.eos], zeros)


def encode_conversation(part: Part, encoding: Any, tokenizer: Tokenizer) -> EncodedSegment:
    """Encode a rendered conversation, opened by its first token.

    The loss mask of a token is 1 if any of its characters is in a learned span.
    """
    bounds = np.cumsum([0, *map(len, part.spans)])
    starts, stops = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
    loss_mask = np.zeros(len(starts), bool)
    for first, last in zip(bounds[1:-1:2], bounds[2::2], strict=True):
        loss_mask |= (starts < last) & (stops > first)
    ends = np.flatnonzero(loss_mask)
    if len(ends) and encoding.ids[ends[-1]] not in tokenizer.added_ids:
        raise UserError(
            f"data.template: the learned text ends with {encoding.tokens[ends[-1]]!r}, which is no special token, so "
            "the model would not learn to stop; write the tokenizer's end of a turn inside the generation tags of the "
            f"template. Rendered: {part.text[-400:]!r}"
        )
    flips = np.flatnonzero(np.diff(loss_mask[1:], prepend=True, append=True)).tolist()  # the opener is not a target
    return EncodedSegment(encoding.ids[0], encoding.ids[1:], list(zip(flips[::2], flips[1::2], strict=True)))


def encode_texts(batch: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each text; texts longer than BATCH_CHARACTERS are split after a line end and encoded in pieces."""
    parts = [list(split_after_lines(text)) for text in batch]
    ids = iter(tokenizer.encode_batch([part for text in parts for part in text]))
    for text in parts:
        yield [token for _ in text for token in next(ids)]


def split_after_lines(text: str) -> Iterator[str]:
    """Split `text` into pieces of at most BATCH_CHARACTERS, after a line end if there is one."""
    start = 0
    while len(text) - start > BATCH_CHARACTERS:
        stop = text.rfind("\n", start, start + BATCH_CHARACTERS) + 1 or start + BATCH_CHARACTERS
        yield text[start:stop]
        start = stop
    yield text[start:]
