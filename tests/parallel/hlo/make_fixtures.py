"""Write `fixtures/*.txt`: what libtpu prints for small programs, cut to the lines that the tests read.

JAX_PLATFORMS=cpu python tests/parallel/hlo/make_fixtures.py     # needs libtpu, and meshwright for the pipeline

The meshes are those of the tests: pipe 2, data 2; for the pipeline pipe 4, tensor 2.
"""

import json
import os
import re
import sys
from pathlib import Path

os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FIXTURES = Path(__file__).parent / "fixtures"
MESH = Mesh(
    np.array(topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices).reshape(2, 2),
    ("pipe", "data"),
)
REPEATED, ROWS, BLOCKS = PartitionSpec(), PartitionSpec("pipe"), PartitionSpec("pipe", "data")
CALLED = re.compile(r"[=\s{]%([\w.\-]+)(?=[,}\s])")
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def permute(x):
    return jax.lax.ppermute(x, "pipe", [(0, 1), (1, 0)])


def scan_gather(x, weights):
    def layer(x, weight):
        return jnp.tanh(x @ jax.lax.all_gather(weight, "data", axis=0, tiled=True)), None

    return jax.lax.scan(layer, x, weights)[0]


def nested_scan(x, weights):
    def layer(x, weight):
        inner = lambda y, _: (jax.lax.psum(jnp.tanh(y @ weight), "data"), None)
        return permute(jax.lax.scan(inner, x, length=3)[0]), None

    return jax.lax.scan(layer, x, weights)[0]


def dynamic_count(x, count):
    return jax.lax.fori_loop(0, count[0], lambda _, y: permute(jnp.sin(y)), x)


def data_dependent(x):
    return jax.lax.while_loop(lambda y: jax.lax.psum(y.sum(), ("pipe", "data")) < 100, lambda y: permute(y * 2), x)


def count_down(x):
    """12, 10, ... while at least 3."""
    return jax.lax.while_loop(lambda s: s[0] >= 3, lambda s: (s[0] - 2, permute(jnp.tanh(s[1]))), (12, x))[1]


def switch(in_branch):
    """Seven rounds with a switch by device, which sums over data or permutes; else the permutation is behind it."""

    def run(x):
        device = jax.lax.axis_index("pipe")

        def body(y, t):
            work = (lambda z: permute(jnp.tanh(z))) if in_branch else (lambda z: jax.lax.psum(jnp.tanh(z), "data"))
            y = jax.lax.switch((device + t) % 2, [work, lambda z: z * 2], y)
            return y if in_branch else permute(y), None

        return jax.lax.scan(body, x, jnp.arange(7))[0]

    return run


def pallas_kernel(x):
    def kernel(read, write):
        write[...] = jnp.tanh(read[...]) * 2

    def body(_, y):
        out = jax.ShapeDtypeStruct(y.shape, y.dtype)
        return permute(pallas.pallas_call(kernel, out_shape=out, metadata={"block": '{"rows": 128}'}, name="twice")(y))

    return jax.lax.fori_loop(0, 7, body, x)


def gradients(x, weights):
    def loss(weights):
        return jax.lax.scan(lambda y, w: (jax.nn.relu(y @ w), None), x, weights)[0].astype(jnp.float32).sum()

    return jax.grad(loss)(weights)


def compiled(f, *arguments, options=None, **jit):
    shapes = [jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(MESH, spec)) for s, dtype, spec in arguments]
    with jax.set_mesh(MESH):
        return jax.jit(f, **jit).lower(*shapes).compile(compiler_options=options or {}).as_text()


def mapped(f, *specs, out):
    return jax.shard_map(f, mesh=MESH, in_specs=specs, out_specs=out, check_vma=False)


def programs():
    """Name -> text of the compiled program."""
    rows, blocks = ((512, 1024), np.float32, ROWS), ((512, 1024), np.float32, BLOCKS)
    stack, sharded = PartitionSpec(), PartitionSpec(None, "data")
    yield (
        "scan_gather",
        compiled(mapped(scan_gather, ROWS, sharded, out=ROWS), rows, ((7, 1024, 1024), np.float32, sharded)),
    )
    yield (
        "nested_scan",
        compiled(mapped(nested_scan, ROWS, stack, out=ROWS), rows, ((5, 1024, 1024), np.float32, stack)),
    )
    yield "dynamic_count", compiled(mapped(dynamic_count, BLOCKS, stack, out=BLOCKS), blocks, ((1,), np.int32, stack))
    for f in (data_dependent, count_down, pallas_kernel):
        yield f.__name__, compiled(mapped(f, BLOCKS, out=BLOCKS), blocks)
    yield "switch", compiled(mapped(switch(in_branch=False), BLOCKS, out=BLOCKS), blocks)
    yield "permute_in_switch", compiled(mapped(switch(in_branch=True), BLOCKS, out=BLOCKS), blocks)
    both = PartitionSpec(("pipe", "data")), PartitionSpec(None, ("pipe", "data"))
    shapes = (((4096, 2048), jnp.bfloat16, both[0]), ((7, 2048, 2048), jnp.bfloat16, both[1]))
    fusion = "xla_tpu_enable_async_collective_fusion"
    yield (
        "async_fusion",
        compiled(
            gradients,
            *shapes,
            out_shardings=NamedSharding(MESH, both[1]),
            options=dict.fromkeys(
                (
                    *(fusion, f"{fusion}_fuse_all_gather", f"{fusion}_multiple_steps"),
                    *("xla_tpu_overlap_compute_collective_tc", "xla_enable_async_all_gather"),
                ),
                True,
            ),
        ),
    )
    yield (
        "sparse_core",
        compiled(
            gradients,
            *shapes,
            out_shardings=NamedSharding(MESH, both[1]),
            options={"xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True},
        ),
    )
    yield "pipeline", pipeline()


def pipeline():
    """The step of recipes/pretrain/pipeline-1f1b.yaml on eight chips of TPU v5p."""
    from meshwright.configs.loader import load_config
    from meshwright.parallel.mesh import make_mesh
    from meshwright.train.engine.program import build

    recipe = Path(sys.modules["meshwright"].__file__).parent / "configs/recipes/pretrain/pipeline-1f1b.yaml"
    config = load_config(recipe, overrides=["mesh.platform=auto"])
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2").devices
    program = build(config, make_mesh(config.mesh, devices=devices))
    step = jax.jit(program.step, out_shardings=(program.shardings, None), donate_argnums=0)
    with jax.set_mesh(program.mesh):
        return step.lower(program._abstract_state(), program.batch_shapes).compile().as_text()


def cut(text, wanted=rf"(?:{COLLECTIVES})(?:-start)?\(|while\(|conditional\(|AsyncCollective", metadata=True):
    """Leave out computations without loops or collectives, arithmetic on arrays, and most of `backend_config`."""
    text = re.sub(r'"/[^"]*/((?:meshwright|tests|site-packages)/)', r'"\1', text)
    if not metadata:
        text = re.sub(r", metadata=\{[^}]*\}", "", text)
    head, *blocks = re.split(r"\n(?=(?:ENTRY )?%\S+ \(.*\{\n)", text)
    blocks = {re.match(r"(?:ENTRY )?%(\S+)", block)[1]: block for block in blocks}
    kept = {name for name, block in blocks.items() if re.search(wanted, block) or block.startswith("ENTRY")}
    while callers := {name for name, block in blocks.items() if set(CALLED.findall(block)) & kept} - kept:
        kept |= callers
    loops = re.findall(r"condition=%([\w.\-]+), body=%([\w.\-]+)", text)
    kept |= {condition for condition, body in loops if body in kept}
    bodies = [cut_block(blocks[name], kept, wanted) for name in blocks if name in kept]
    used = set(re.findall(r"stack_frame_id=(\d+)", "".join(bodies)))
    return "\n".join([cut_tables(head, {int(one) for one in used}), *bodies])


def cut_block(block, kept, wanted):
    """The collectives, what runs `kept` computations, and the integers and tuples that these read."""
    header, *lines = re.sub(r"\n(?=[\"}]\S)", "\0", block).split("\n")
    header = re.sub(r"\(.*\{", "(...) -> ... {", header) if len(header) > 300 else header
    result, read = [], set()
    for line in reversed(lines):
        names = re.findall(r"%([\w.\-]+)", line)
        passes_on = re.search(r" = (?:s32\[\]|\()", line) or " parameter(" in line
        if (
            not line.startswith("  ")
            or line.startswith("  ROOT")
            or (re.search(wanted, line) and "while(" not in line)
            or "custom-call(" in line
            or set(names[1:]) & kept
            or (names[0] in read and passes_on)
        ):
            result.append(shorten(line))
            read |= set(names[1:])
    return "\n".join([header, *reversed(result)]).replace("\0", "\n")


def shorten(line):
    if (parts := re.match(r"(\s+(?:ROOT )?%\S+ = )(\(.*?\))( [a-z][\w\-]*\(.*)", line, re.DOTALL)) and len(
        parts[2]
    ) > 200:
        line = f"{parts[1]}(...){parts[3]}"
    start = line.find(", backend_config={")
    if start < 0:
        return line
    config, end = json.JSONDecoder(strict=False).raw_decode(line, start + len(", backend_config="))
    cycles = config.get("window_config", {}).get("estimated_cycles")
    short = {"window_config": {"estimated_cycles": cycles}} if cycles else {}
    short |= {name: config[name] for name in ("async_collective_fusion_config",) if name in config}
    return line[:start] + (f", backend_config={json.dumps(short, separators=(',', ':'))}" if short else "") + line[end:]


def cut_tables(head, used):
    """Without the frames that no instruction names, and their places."""
    module, *tables = head.split("\n\n")
    rows = {
        title: dict(re.findall(r"^(\d+) (.*)", body, re.MULTILINE))
        for title, body in (table.strip().split("\n", 1) for table in tables if table.strip())
    }
    parent = {
        int(one): int(re.search(r"parent_frame_id=(\d+)", row)[1]) - 1 for one, row in rows["StackFrames"].items()
    }
    while more := {parent[one] for one in used} - used - {0}:
        used |= more
    kept = {"StackFrames": {str(one) for one in used}}
    for title, source, field in (
        ("FileLocations", "StackFrames", "file_location_id"),
        ("FunctionNames", "FileLocations", "function_name_id"),
        ("FileNames", "FileLocations", "file_name_id"),
    ):
        kept[title] = {re.search(rf"{field}=(\d+)", rows[source][one])[1] for one in kept[source]}
    lines = [f"{title}\n" + "".join(f"{one} {row}\n" for one, row in table.items() if one in kept[title])
             for title, table in rows.items() if kept[title]]  # fmt: skip
    return "\n".join([module.split(",")[0] + "\n", *lines, ""])


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    for name, text in programs():
        small = cut(text, r"collective-permute-start\(", metadata=False) if name == "pipeline" else cut(text)
        (FIXTURES / f"{name}.txt").write_text(small)
        print(name, len(text), "->", len(small))
