"""Synthetic documents: lines of numbers in steps, which a small model learns quickly."""

from dataclasses import dataclass

import numpy as np

from .documents import digest

WORDS = ("apples", "boats", "clouds", "doors", "eggs", "foxes", "grapes", "houses")
LINES = (2, 12)  # lines per document, from and below
TERMS = (4, 16)  # numbers per line, from and below


@dataclass(frozen=True)
class SyntheticDocuments:
    """Document `index` is a pure function of (seed, index)."""

    count: int
    seed: int = 0

    @property
    def fingerprint(self) -> str:
        return digest("synthetic", str(self.seed), str(self.count))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> str:
        """The document does not depend on `count`.

        >>> SyntheticDocuments(3)[0] == SyntheticDocuments(9)[0]
        True
        """
        random = np.random.default_rng([self.seed, index])
        lines = []
        for _ in range(random.integers(*LINES)):
            word, start, step = random.choice(WORDS), random.integers(100), random.integers(1, 10)
            numbers = start + step * np.arange(random.integers(*TERMS))
            lines.append(f"{word}: {' '.join(map(str, numbers))}\n")
        return "".join(lines)
