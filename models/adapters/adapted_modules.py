"""Which linear maps get adapters: every linear map of the blocks has a name, and `adapter.targets` matches names.

    layers/7/attn/q     is matched by   q   attn/q   layers/7/*   layers/*/attn/[qv]

A run stacks the weights of its layers. A stack has an adapter where one of its layers is matched; the adapter's arrays
are as wide as its widest layer needs. A `scale` of zeros switches off what a layer does not have, exactly, also in the
gradient.
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

# The targets of each method's paper, for users who name none.
DEFAULT_TARGETS = {"ia3": ["k", "v", "down"], "bitfit": ["*/bias"], "norms": ["*_norm/*"]}


@dataclass(frozen=True)
class AdaptedModule:
    """A stack of linear maps, one a layer, that gets adapters."""

    path: str  # in the run: segments/0/1/block/attn/q
    layer_names: tuple[str, ...]  # canonical name of each layer's map
    inputs: tuple[int, ...]  # input dimensions of one map
    outputs: tuple[int, ...]  # output dimensions of one map
    ranks: tuple[int, ...]  # of each layer; 0: none
    scales: tuple[float, ...]  # of each layer: what multiplies its added map
    map_index: int  # of the map in its block: dropout draws by it

    @property
    def rank(self) -> int:
        """Of the widest layer."""
        return max(self.ranks)

    @property
    def scale(self) -> np.ndarray:
        """[layers, rank] float32: a layer's scale up to its rank, zero beyond."""
        has_rank = np.arange(self.rank) < np.array(self.ranks)[:, None]
        return np.where(has_rank, np.array(self.scales)[:, None], 0).astype(np.float32)


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
    """(path of the block, numbers of its layers) of every stack of layers."""
    first = 0
    for number, (pattern, repeats) in enumerate(model.segments):
        for position in range(len(pattern)):
            layers = [first + repeat * len(pattern) + position for repeat in range(repeats)]
            yield f"segments/{number}/{position}/block", layers
        first += len(pattern) * repeats


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name, or the end of it behind a slash; * ? [ab] as in file names.

    >>> matches("layers/7/attn/q", "q"), matches("layers/7/attn/q", "layers/[0-3]/*")
    (True, False)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}")


def select_names(key: str, patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that some pattern matches.

    Raises UserError for a pattern of the setting `key` that matches none, and lists what there is.
    """
    names, selected = list(names), set()
    for pattern in patterns:
        if not (matching := {name for name in names if matches(name, pattern)}):
            candidates = {name.split("/", 2)[-1] if name.startswith("layers/") else name for name in names}
            raise UserError.no_match(key, [pattern], candidates=candidates)
        selected |= matching
    return selected


def in_trained_layers(names: Iterable[str], model: ModelConfig, adapter: AdapterConfig) -> set[str]:
    """The names without those in layers that `adapter.layers` excludes."""
    first = first_trained(model, adapter)
    return {name for name in names if not name.startswith("layers/") or int(name.split("/")[1]) >= first}


def find_adapted_modules(model: ModelConfig, adapter: AdapterConfig) -> list[AdaptedModule]:
    """The stacks of linear maps that `adapter` adds to. Raises UserError for a pattern that matches nothing."""
    maps = linear_maps(model)
    names = [f"layers/{layer}/{name}" for layer in range(model.layers) for name in maps]
    patterns = DEFAULT_TARGETS.get(adapter.method, ["*"]) if adapter.targets is None else adapter.targets
    targets = in_trained_layers(select_names("adapter.targets", patterns, names), model, adapter)
    select_names("adapter.ranks", adapter.ranks, targets)
    select_names("adapter.alphas", adapter.alphas, targets)
    modules = []
    for path, layers in layer_stacks(model):
        for map_index, (name, (inputs, outputs)) in enumerate(maps.items()):
            layer_names = tuple(f"layers/{layer}/{name}" for layer in layers)
            sizes = [rank_and_scale(module, adapter) if module in targets else (0, 0.0) for module in layer_names]
            if any(rank for rank, _ in sizes):
                ranks, scales = zip(*sizes, strict=True)
                modules.append(AdaptedModule(f"{path}/{name}", layer_names, inputs, outputs, ranks, scales, map_index))
    return modules


def rank_and_scale(module: str, adapter: AdapterConfig) -> tuple[int, float]:
    """(rank, factor of the added map) of the module with canonical name `module`; (1, 1) for methods without a rank."""
    if adapter.method in ("ia3", "oft", "shira"):
        return 1, 1.0
    if adapter.method == "vera":
        return adapter.rank, 1.0
    rank = next((rank for pattern, rank in adapter.ranks.items() if matches(module, pattern)), adapter.rank)
    default = rank if adapter.alpha is None else adapter.alpha
    alpha = next((alpha for pattern, alpha in adapter.alphas.items() if matches(module, pattern)), default)
    return rank, alpha / (sqrt(rank) if adapter.rank_stabilized else rank)
