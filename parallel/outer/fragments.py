"""Fragments: the parts of a model that are synchronized at different times, by canonical layers. No JAX.

The first fragment is everything that is not a layer (embedding, final norm, head); the others divide the layers.
`strided` gives fragment i the layers i, i + n, i + 2n, ..., so neighbours never travel together; `sequential` gives it
consecutive layers. Source: Streaming DiLoCo, arXiv:2501.18512, section 2.1.
"""

import re
from typing import NamedTuple

LAYER = re.compile(r"(?:.*/)?layers/(\d+)/.*")


class Fragment(NamedTuple):
    """A part of the model by canonical names."""

    layers: tuple[int, ...]
    embed_and_head: bool  # whether embedding, final norm and head are in it

    def contains(self, name: str) -> bool:
        """Whether the canonical array `name` is in the fragment.

        >>> Fragment(layers=(1, 3), embed_and_head=False).contains("params/layers/3/attn/q/kernel")
        True
        """
        layer = LAYER.fullmatch(name)
        return self.embed_and_head if layer is None else int(layer[1]) in self.layers


def split_fragments(layers: int, *, count: int, order: str) -> tuple[Fragment, ...]:
    """`count` fragments of a model of `layers` layers; a single fragment is the whole model.

    >>> [fragment.layers for fragment in split_fragments(6, count=4, order="strided")]
    [(), (0, 3), (1, 4), (2, 5)]
    >>> [fragment.layers for fragment in split_fragments(6, count=4, order="sequential")]
    [(), (0, 1), (2, 3), (4, 5)]
    """
    numbers = tuple(range(layers))
    if count == 1:
        return (Fragment(numbers, embed_and_head=True),)
    groups = count - 1
    if order == "strided":
        layer_groups = [numbers[group::groups] for group in range(groups)]
    else:
        layer_groups = [numbers[layers * group // groups : layers * (group + 1) // groups] for group in range(groups)]
    return (Fragment((), embed_and_head=True), *(Fragment(group, embed_and_head=False) for group in layer_groups))


def fragment_offsets(count: int, *, interval: int) -> list[int]:
    """Updates by which each fragment's outer steps follow the first one's, evenly over `interval`.

    >>> fragment_offsets(4, interval=30)
    [0, 7, 15, 22]
    """
    return [interval * number // count for number in range(count)]
