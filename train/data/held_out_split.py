"""The held-out split: the text alone decides whether a document is held out.

Adding, removing, renaming or reordering other documents does not change the decision, and two copies of a text are on
the same side, so no evaluated text was trained on.
"""

from collections.abc import Iterable

import numpy as np
import xxhash


def text_identity(text: str) -> int:
    """A 64-bit hash of the text, uniform over texts."""
    return xxhash.xxh3_64_intdigest(text.encode())


def select_held_out(identities: Iterable[int], *, fraction: float) -> np.ndarray:
    """[documents] bool: whether a document is held out.

    Held out is the smallest `fraction` of all possible identities. Where one side would be empty, the smallest identity
    is held out, or the largest is trained on; of a single text nothing is held out.

    >>> select_held_out([1 << 63, 7, 1 << 60], fraction=0.1).tolist()
    [False, True, True]
    """
    values = np.array(identities if isinstance(identities, np.ndarray) else list(identities), np.uint64)
    mask = values.astype(np.float64) < fraction * 2.0**64
    if fraction > 0:
        mask |= values == values.min(initial=np.iinfo(np.uint64).max)
        mask &= values != values.max(initial=0)
    return mask
