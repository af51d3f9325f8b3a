"""Fragments: the parts of a model that are exchanged at different times, in canonical layers. No JAX.

The first fragment is what is no layer (embedding, final norm, head); the others deal out the layers. `strided` gives
fragment i the layers i, i + n, i + 2n, ..., so that neighbours never travel together; `sequential` gives it a run of
neighbours. Source: Streaming DiLoCo, arXiv:2501.18512, section 2.1.
"""

import re
from typing import NamedTuple

LAYER = re.compile(r"(?:.*/)?layers/(\d+)/.*")


class Fragment(NamedTuple):
    """A part of the model by canonical names."""

    layers: tuple[int, ...]
    ends: bool  # embedding, final norm and head too

    def owns(self, name: str) -> bool:
        """Whether the canonical array `name` is in it.

        >>> Fragment(layers=(1, 3), ends=False).owns("params/layers/3/attn/q/kernel")
        True
        """
        layer = LAYER.fullmatch(name)
        return self.ends if layer is None else int(layer[1]) in self.layers


def fragments(layers: int, *, count: int, order: str) -> tuple[Fragment, ...]:
    """`count` fragments of a model of `layers` layers; one fragment is all of it.

    >>> [part.layers for part in fragments(6, count=4, order="strided")]
    [(), (0, 3), (1, 4), (2, 5)]
    >>> [part.layers for part in fragments(6, count=4, order="sequential")]
    [(), (0, 1), (2, 3), (4, 5)]
    """
    every = tuple(range(layers))
    if count == 1:
        return (Fragment(every, ends=True),)
    parts = count - 1
    if order == "strided":
        dealt = [every[part::parts] for part in range(parts)]
    else:
        dealt = [every[layers * part // parts : layers * (part + 1) // parts] for part in range(parts)]
    return (Fragment((), ends=True), *(Fragment(part, ends=False) for part in dealt))


def offsets(count: int, *, every: int) -> list[int]:
    """Updates by which each fragment's meetings come after the first's, evenly over a round of `every`.

    >>> offsets(4, every=30)
    [0, 7, 15, 22]
    """
    return [every * number // count for number in range(count)]
