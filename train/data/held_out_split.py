"""Which documents are held out: decided by the text alone.

Adding, removing, renaming or reordering other documents moves no document across the line, and two copies of one text
always land on the same side, so nothing evaluated was trained on.
"""

from collections.abc import Iterable

import numpy as np
import xxhash


def text_identity(text: str) -> int:
    """64 bits of the text, uniform over texts."""
    return xxhash.xxh3_64_intdigest(text.encode())


def select_held_out(identities: Iterable[int], *, fraction: float) -> np.ndarray:
    """[documents] bool: true where a document is held out.

    The smallest `fraction` of all possible identities are. Where that would leave either side empty, the smallest
    identity is held out, or the largest kept; of one text nothing is held out.

    >>> held_out([1 << 63, 7, 1 << 60], fraction=0.1).tolist()
    [False, True, True]
    """
    values = np.array(identities if isinstance(identities, np.ndarray) else list(identities), np.uint64)
    chosen = values.astype(np.float64) < fraction * 2.0**64
    if fraction > 0:
        chosen |= values == values.min(initial=np.iinfo(np.uint64).max)
        chosen &= values != values.max(initial=0)
    return chosen
