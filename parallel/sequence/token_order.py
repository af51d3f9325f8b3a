"""In which order the tokens of a row are laid out over the devices of the `seq` axis. NumPy only.

An order is an index array: `order[place]` is the token that stands at `place`, and device r of R holds the r-th of R
equal runs of places. Causal attention gives the token at i work for i + 1 keys, so equal runs of tokens are unequal
work: in `zigzag` order each device holds an early chunk and the mirrored late one, and all work the same.

    tokens 0-15 on 4 devices     contiguous   0-3       | 4-7        | 8-11      | 12-15
                                 zigzag       0-1 14-15 | 2-3 12-13  | 4-5 10-11 | 6-7 8-9

Targets are shifted before a row is reordered; positions and documents move with their tokens.
"""

from collections.abc import Mapping

import numpy as np

from ...configs.errors import UserError


def contiguous(tokens: int, *, ranks: int) -> np.ndarray:
    """Tokens as they come, int32 [tokens]: device r holds the r-th run.

    >>> contiguous(8, ranks=2)
    array([0, 1, 2, 3, 4, 5, 6, 7], dtype=int32)
    """
    _check_divisible(tokens, ranks)
    return np.arange(tokens, dtype=np.int32)


def zigzag(tokens: int, *, ranks: int) -> np.ndarray:
    """2 * ranks equal chunks, device r holding chunks r and 2 * ranks - 1 - r, int32 [tokens].

    >>> zigzag(8, ranks=2)
    array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    _check_divisible(tokens, 2 * ranks)
    chunks = np.arange(tokens, dtype=np.int32).reshape(2 * ranks, -1)
    return np.stack([chunks[:ranks], chunks[: ranks - 1 : -1]], axis=1).reshape(-1)


# Ulysses gives every device whole rows to attend in, which plain order lets a kernel plan ahead.
ORDER_OF = {"all-gather": zigzag, "ring": zigzag, "ulysses": contiguous}


def inverse(order: np.ndarray) -> np.ndarray:
    """The order that undoes `order`: `row[order][inverse(order)]` is `row`."""
    return np.argsort(order).astype(np.int32)


def reordered(batch: Mapping[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of [rows, sequence] arrays, all of them permuted alike; on the host, before rows are cut over devices."""
    return {field: array[:, order] for field, array in batch.items()}


def _check_divisible(tokens: int, parts: int) -> None:
    if tokens % parts:
        raise UserError(
            f"data.sequence_length: {tokens} tokens cannot be cut into {parts} equal parts for mesh.seq; "
            f"use {tokens // parts * parts or parts} or {(tokens // parts + 1) * parts}"
        )
