"""Where adapters go: every linear map of the blocks has a name, and `adapter.targets` picks among the names.

    layers/7/attn/q     is matched by   q   attn/q   layers/7/*   layers/*/attn/[qv]

The run holds layers in stacks. A stack has an adapter where one of its layers is picked; its arrays are as wide as the
widest layer needs, and a `scale` of zeros switches off what a layer does not have: exactly, also in the gradient.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import sqrt

import numpy as np

from ...configs.errors import UserError
from ...configs.sections.adapter import AdapterConfig
from ...configs.sections.model import ModelConfig
from ...configs.trained_segments import first_trained

# What the original of each method adapts where the user does not say.
DEFAULT_TARGETS = {"ia3": ["k", "v", "down"], "bitfit": ["*/bias"], "norms": ["*_norm/*"]}


@dataclass(frozen=True)
class AdaptedModule:
    """A stack of linear maps that gets adapters."""

    path: str  # in the run: segments/0/1/block/attn/q
    layer_names: tuple[str, ...]  # canonical name of each layer's
    inputs: tuple[int, ...]  # dimensions of what the map reads
    outputs: tuple[int, ...]  # and of what it makes
    ranks: tuple[int, ...]  # of each layer; 0: none
    scales: tuple[float, ...]  # what multiplies each layer's added map
    map_index: int  # of the map in its block: what its dropout is drawn by

    @property
    def rank(self) -> int:
        """Of the widest layer."""
        return max(self.ranks)

    @property
    def scale(self) -> np.ndarray:
        """[layers, rank] float32: a layer's scale up to its rank, zero beyond."""
        inside = np.arange(self.rank) < np.array(self.ranks)[:, None]
        return np.where(inside, np.array(self.scales)[:, None], 0).astype(np.float32)


def linear_maps(model: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Name in a block -> (input dimensions, output dimensions) of every linear map."""
    embed, heads, width = (model.embed,), model.heads, model.head_width
    keys = (model.key_value_heads, width)
    maps = {
        "attn/q": (embed, (heads, width)),
        "attn/k": (embed, keys),
        "attn/v": (embed, keys),
        "attn/o": ((heads, width), embed),
        "mlp/gate": (embed, (model.mlp,)),
        "mlp/up": (embed, (model.mlp,)),
        "mlp/down": ((model.mlp,), embed),
    }
    return {name: sizes for name, sizes in maps.items() if name != "mlp/gate" or model.activation != "gelu"}


def layer_stacks(model: ModelConfig) -> Iterator[tuple[str, list[int]]]:
    """(path of a stack's block, numbers of its layers) of every stack."""
    first = 0
    for number, (pattern, repeats) in enumerate(model.segments):
        for place in range(len(pattern)):
            layers = [first + repeat * len(pattern) + place for repeat in range(repeats)]
            yield f"segments/{number}/{place}/block", layers
        first += len(pattern) * repeats


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name, or the end of it behind a slash; * ? [ab] as in file names.

    >>> matches("layers/7/attn/q", "q"), matches("layers/7/attn/q", "layers/[0-3]/*")
    (True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}")


def select_names(key: str, patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names some pattern matches. Raises UserError, listing what there is, for a pattern that matches none."""
    names, found = list(names), set()
    for pattern in patterns:
        if not (own := {name for name in names if matches(name, pattern)}):
            known = {name.split("/", 2)[-1] if name.startswith("layers/") else name for name in names}
            raise UserError.no_match(key, [pattern], known=known)
        found |= own
    return found


def in_trained_layers(names: Iterable[str], model: ModelConfig, adapter: AdapterConfig) -> set[str]:
    """Without the names in layers that `adapter.layers` leaves alone."""
    first = first_trained(model, adapter)
    return {name for name in names if not name.startswith("layers/") or int(name.split("/")[1]) >= first}


def find_adapted_modules(model: ModelConfig, adapter: AdapterConfig) -> list[AdaptedModule]:
    """The stacks of linear maps that `adapter` adds to. Raises UserError for a pattern that matches nothing."""
    maps = linear_maps(model)
    names = [f"layers/{layer}/{name}" for layer in range(model.layers) for name in maps]
    patterns = DEFAULT_TARGETS.get(adapter.method, ["*"]) if adapter.targets is None else adapter.targets
    chosen = in_trained_layers(select_names("adapter.targets", patterns, names), model, adapter)
    for key, given in (("ranks", adapter.ranks), ("alphas", adapter.alphas)):
        select_names(f"adapter.{key}", given, chosen)
    found = []
    for path, layers in layer_stacks(model):
        for number, (name, (inputs, outputs)) in enumerate(maps.items()):
            modules = tuple(f"layers/{layer}/{name}" for layer in layers)
            sizes = [rank_and_scale(module, adapter) if module in chosen else (0, 0.0) for module in modules]
            if any(rank for rank, _ in sizes):
                ranks, scales = zip(*sizes, strict=True)
                found.append(AdaptedModule(f"{path}/{name}", modules, inputs, outputs, ranks, scales, number))
    return found


def rank_and_scale(module: str, adapter: AdapterConfig) -> tuple[int, float]:
    """(rank, what multiplies the added map) of one module; methods without a rank have 1 and 1."""
    if adapter.method in ("ia3", "oft", "shira"):
        return 1, 1.0
    if adapter.method == "vera":
        return adapter.rank, 1.0
    rank = next((rank for pattern, rank in adapter.ranks.items() if matches(module, pattern)), adapter.rank)
    default = rank if adapter.alpha is None else adapter.alpha
    alpha = next((alpha for pattern, alpha in adapter.alphas.items() if matches(module, pattern)), default)
    return rank, alpha / (sqrt(rank) if adapter.rank_stabilized else rank)
