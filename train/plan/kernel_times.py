"""Seconds of Pallas kernels, of which the compiler gives no estimate: from the file of the hardware target.

The cycles there were counted in the instruction bundles that libtpu writes (`meshwright bench targets`).
"""

import math
import re

from ...configs.hardware_targets import HardwareTarget
from ...models.attention.splash import block_side
from ...parallel.hlo.text import Instruction

KERNEL = re.compile(r"(?P<kernel>splash_m[hq]a_(?:fwd|dkv|dq))_")
# The first array of the operands that is not a table of the mask: q [rows, heads, tokens, head_dim].
QUERIES = re.compile(r"operand_layout_constraints=\{.*?(?:bf16|f32)\[(?P<sizes>\d+(?:,\d+){2,})\]")
LARGEST_SIDE = 1024


def kernel_seconds(instruction: Instruction, target: HardwareTarget, *, causal: bool) -> float | None:
    """Seconds of one run of a kernel's custom call; None if the target's file has none for its shape.

    `causal` says that every query sees all keys up to its own: the text does not tell what a mask hides.
    """
    found = KERNEL.match(instruction.name)
    if found is None or target.clock_hz is None or not causal:
        return None
    sizes = kernel_shape(instruction)
    if sizes is None:
        return None
    heads, tokens, head_dim = sizes
    cycles = target.kernels.get(found["kernel"], {}).get(head_dim)
    side = block_side(tokens, head_dim * 2)
    if cycles is None or side != LARGEST_SIDE:
        return None
    blocks = tokens // side
    each = blocks**2 * cycles.step + blocks * (blocks + 1) / 2 * cycles.tile + blocks * cycles.line
    return heads * each / cycles.cores / target.clock_hz


def kernel_shape(instruction: Instruction) -> tuple[int, int, int] | None:
    """(heads of all rows, tokens, head_dim) of the queries; None where the text does not give them."""
    found = QUERIES.search(instruction.text)
    if found is None:
        return None
    *heads, tokens, head_dim = (int(size) for size in found["sizes"].split(","))
    return math.prod(heads), tokens, head_dim
