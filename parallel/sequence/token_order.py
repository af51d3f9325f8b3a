"""The order of a row's tokens over the devices of the `seq` axis. NumPy only.

An order is an index array: `order[position]` is the token at `position`, and device r of R holds the r-th of R equal
runs of positions. In causal attention the token at i has i + 1 keys, so equal runs of tokens are unequal work. In
`zigzag` order each device holds an early chunk and the mirrored late one, which makes the work equal.

    tokens 0-15 on 4 devices     contiguous   0-3       | 4-7        | 8-11      | 12-15
                                 zigzag       0-1 14-15 | 2-3 12-13  | 4-5 10-11 | 6-7 8-9

Targets are shifted before a row is reordered; positions and documents move with their tokens.
"""

import numpy as np

from ...configs.errors import UserError


def contiguous(tokens: int, *, ranks: int) -> np.ndarray:
    """Plain order, int32 [tokens]: device r holds the r-th run.

    >>> contiguous(8, ranks=2)
    array([0, 1, 2, 3, 4, 5, 6, 7], dtype=int32)
    """
    _check_divisible(tokens, ranks)
    return np.arange(tokens, dtype=np.int32)


def zigzag(tokens: int, *, ranks: int) -> np.ndarray:
    """2 * ranks equal chunks, int32 [tokens]: device r holds chunks r and 2 * ranks - 1 - r.

    >>> zigzag(8, ranks=2)
    array([0, 1, 6, 7, 2, 3, 4, 5], dtype=int32)
    """
    _check_divisible(tokens, 2 * ranks)
    chunks = np.arange(tokens, dtype=np.int32).reshape(2 * ranks, -1)
    return np.stack([chunks[:ranks], chunks[: ranks - 1 : -1]], axis=1).reshape(-1)


# With Ulysses every device attends in whole rows; plain order lets a kernel skip blocks by their positions.
STRATEGY_ORDERS = {"all-gather": zigzag, "ring": zigzag, "ulysses": contiguous}


def _check_divisible(tokens: int, parts: int) -> None:
    if tokens % parts:
        raise UserError(
            f"data.sequence_length: {tokens} tokens, which mesh.seq needs in {parts} equal parts; "
            f"use {tokens // parts * parts or parts} or {(tokens // parts + 1) * parts}"
        )
