"""`meshwright bench targets`: what the tables of hardware targets are measured with. Needs the extra `targets`.

    meshwright bench targets --target v5p:2x2x1 --head-dim 64

compiles the attention kernels for a TPU that is not here, and counts the instruction bundles that libtpu writes for
them, one a cycle: of a step of the kernel's grid, of a block of scores, of a line of blocks. The lines printed belong
into `kernels` of `configs/hardware/NAME.yaml`.
"""

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..configs.hardware_targets import KernelCycles, parse_topology
from .harness import bench_parser

TOKENS, HEADS, KV_HEADS = 4096, 32, 8  # of the kernel compiled: a grid of 4 x 4 blocks for each head
ADDRESS = re.compile(r"\s*(0x[0-9a-f]+)")
EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test")
REGION = re.compile(r"(Start/End empty region|Start region|End region) (\d+)")
SMALL, LEAF = 60, 30  # bundles: of a region that counts, and of one that may be inside of another
KERNEL = re.compile(r"(splash_m[hq]a_(?:fwd|dkv|dq))_")


@dataclass(frozen=True)
class Region:
    """Bundles between two addresses, which run or are skipped together."""

    start: int
    end: int

    @property
    def bundles(self) -> int:
        """Its length."""
        return self.end - self.start + 1


@dataclass(frozen=True)
class Bundles:
    """The loop of a kernel over its grid, and the regions inside."""

    loop: Region
    rounds: int
    regions: tuple[Region, ...]


def read_bundles(text: str) -> Bundles:
    """Read the listing `...-final_bundles.txt` of a kernel. Raises ValueError where it has no loop."""
    starts: dict[str, int] = {}
    regions: list[Region] = []
    address, begin, end, rounds = 0, None, None, 0
    for line in text.splitlines():
        if place := ADDRESS.match(line):
            address = int(place[1], 16)
        if begin is None and " LB:" in line:
            begin = address
        if test := EXIT.search(line):
            end, rounds = address, rounds or int(test[1])
        for event, number in REGION.findall(line):
            if event == "Start region":
                starts[number] = address
            elif event == "End region" and number in starts:
                regions.append(Region(starts[number], address))
    if begin is None or end is None:
        raise ValueError(f"no loop in {len(text)} characters of bundles")
    inside = tuple(region for region in regions if region.start > begin and region.end <= end)
    return Bundles(Region(begin, end - 1), rounds, inside)


def count_cycles(bundles: Bundles, *, steps: int) -> KernelCycles:
    """The cycles of a kernel whose grid has `steps` steps for all heads, from its loop.

    The longest region without another inside computes a block; the next two, at the ends of a line of blocks, prepare
    and write a result. What is left of the loop runs in each step. If the loop has half of the rounds, two cores share
    the heads.
    """
    leaves = [
        region
        for region in bundles.regions
        if not any(
            other is not region and region.start <= other.start and other.end <= region.end and other.bundles > LEAF
            for other in bundles.regions
        )
    ]
    tile, *ends = sorted((region.bundles for region in leaves), reverse=True)
    line = sum(length for length in ends[:2] if length > SMALL)
    cores = max(1, round(steps / bundles.rounds))
    return KernelCycles(step=bundles.loop.bundles - tile - line, tile=tile, line=line, cores=cores)


def measure_kernels(target: str, head_dim: int) -> dict[str, KernelCycles]:
    """Kernel -> cycles, for one head_dim on a target such as `v5p:2x2x1`. Works once in a process: libtpu's options."""
    with tempfile.TemporaryDirectory() as directory:
        options = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {options}".strip()
        compile_kernels(target, head_dim)
        found = {}
        for file in sorted(Path(directory).glob("*-final_bundles.txt")):
            kernel = KERNEL.search(file.name)
            if kernel is not None and "schedule-analysis" not in file.name:
                steps = HEADS * (TOKENS // 1024) ** 2
                found[kernel[1]] = count_cycles(read_bundles(file.read_text()), steps=steps)
        return found


def compile_kernels(target: str, head_dim: int) -> None:
    """Compile forward and backward pass of causal attention over documents for one device of `target`."""
    from ..parallel.compile_target import prepare_to_compile, target_devices

    prepare_to_compile()
    import jax
    import jax.numpy as jnp

    from ..models.attention.interface import Mask, TokenIndices
    from ..models.attention.splash import SPLASH

    sharding = jax.sharding.SingleDeviceSharding(target_devices(parse_topology(target))[0])

    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def attend(q, k, v, segments, out, lse, d_out):
        indices = TokenIndices(query_segments=segments, key_segments=segments)
        return SPLASH.forward(q, k, v, Mask(), indices), SPLASH.backward(q, k, v, out, lse, d_out, Mask(), indices)

    q, k = array(1, TOKENS, HEADS, head_dim), array(1, TOKENS, KV_HEADS, head_dim)
    segments, lse = array(1, TOKENS, dtype=jnp.int32), array(1, TOKENS, HEADS, dtype=jnp.float32)
    jax.jit(attend).lower(q, k, k, segments, q, lse, q).compile()


def main(arguments: Sequence[str] = ()) -> dict[str, KernelCycles]:
    """Measure, and print the lines of the target's file."""
    parser = bench_parser("targets", __doc__)
    parser.add_argument("--target", default="v5p:2x2x1")
    parser.add_argument("--head-dim", type=int, default=128)
    options = parser.parse_args(arguments)
    measured = measure_kernels(options.target, options.head_dim)
    for kernel, cycles in measured.items():
        values = f"step: {cycles.step:g}, tile: {cycles.tile:g}, line: {cycles.line:g}"
        print(f"{kernel}: {{{options.head_dim}: {{{values}{f', cores: {cycles.cores}' * (cycles.cores > 1)}}}}}")
    return measured
