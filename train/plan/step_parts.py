"""Which part of a training step an instruction of the compiled program belongs to, by the source line that made it."""

import re
from collections.abc import Sequence

from ...parallel.hlo.text import SourceFrame

# Parts in the order in which a report shows them.
PARTS = ("attention", "products", "loss", "embedding", "optimizer", "other layers", "copies", "collectives", "rest")

LAYERS = "layers"
# Of the first frame, from the innermost, that matches a pattern, that pattern decides.
BY_FRAME = (
    ("attention", re.compile(r"/models/attention/|/parallel/sequence/|/splash_attention/|/tokamax/")),
    ("embedding", re.compile(r"/parallel/vocabulary\.py:embedding")),
    (
        "loss",
        re.compile(r"/parallel/vocabulary\.py|/parallel/distillation_kl\.py|:map_over_logits|:Decoder\.head_kernel"),
    ),
    (LAYERS, re.compile(r"/meshwright/models/")),
    ("optimizer", re.compile(r"/optax/|/train/optim/|:make_update")),
    ("loss", re.compile(r"/train/objectives/")),
)


def part_of(frames: Sequence[SourceFrame], *, is_product: bool, is_copy: bool) -> str:
    """The part of an instruction that comes from the source `frames`, innermost first."""
    part = next((part for frame in frames if (part := _part_of_frame(frame)) is not None), None)
    if part not in (LAYERS, None):
        return part
    if is_product:
        return "products"
    if is_copy:
        return "copies"
    return "rest" if part is None else "other layers"


def _part_of_frame(frame: SourceFrame) -> str | None:
    place = f"{frame.file}:{frame.function}"
    return next((part for part, pattern in BY_FRAME if pattern.search(place)), None)
