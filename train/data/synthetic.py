"""Synthetic documents: lines of numbers in steps, which a small model learns quickly."""

import numpy as np

from .documents import Documents, digest

WORDS = ("apples", "boats", "clouds", "doors", "eggs", "foxes", "grapes", "houses")
LINES = (2, 12)  # lines per document, from and below
TERMS = (4, 16)  # numbers per line, from and below


def synthetic_documents(count: int, *, seed: int = 0) -> Documents:
    """`count` documents; document `index` is a pure function of (seed, index).

    >>> synthetic_documents(3)[0] == synthetic_documents(9)[0]
    True
    """

    def read(index: int) -> str:
        random = np.random.default_rng([seed, index])
        lines = []
        for _ in range(random.integers(*LINES)):
            word, start, step = random.choice(WORDS), random.integers(100), random.integers(1, 10)
            numbers = start + step * np.arange(random.integers(*TERMS))
            lines.append(f"{word}: {' '.join(map(str, numbers))}\n")
        return "".join(lines)

    return Documents(count, read, digest("synthetic", str(seed), str(count)))
