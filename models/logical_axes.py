"""Logical axes: the one function from a weight's path to the names of its dimensions.

`parallel/sharding.py` maps these names to axes of the mesh.
"""

WEIGHT_AXES = {
    "embed/embedding": ("vocab", "embed"),
    "embed/positions": (None, "embed"),
    "head/kernel": ("embed", "vocab"),
    "score/kernel": ("embed", None),
    "attn/q/kernel": ("embed", "heads", "head_dim"),
    "attn/k/kernel": ("embed", "kv_heads", "head_dim"),
    "attn/v/kernel": ("embed", "kv_heads", "head_dim"),
    "attn/o/kernel": ("heads", "head_dim", "embed"),
    "attn/q/bias": ("heads", "head_dim"),
    "attn/k/bias": ("kv_heads", "head_dim"),
    "attn/v/bias": ("kv_heads", "head_dim"),
    "mlp/gate/kernel": ("embed", "mlp"),
    "mlp/up/kernel": ("embed", "mlp"),
    "mlp/down/kernel": ("mlp", "embed"),
    "mlp/gate/bias": ("mlp",),
    "mlp/up/bias": ("mlp",),
    "attn/prefix/k": (None, "kv_heads", "head_dim"),
    "attn/prefix/v": (None, "kv_heads", "head_dim"),
}


def axis_names(path: str) -> tuple[str | None, ...]:
    """Logical axes of the weight at `path`, without the leading `layers` of a stacked one.

    Norm scales and the biases of row-parallel maps have none: `(None, ...)` means replicated on every device.

    >>> axis_names("segments/0/0/block/attn/q/kernel")
    ('embed', 'heads', 'head_dim')
    """
    parts = path.split("/")
    if len(parts) > 3 and parts[-2] == "kernel":
        return quantized_axis_names("/".join(parts[-4:-2]), parts[-1])
    if len(parts) > 3 and parts[-2] == "adapter":
        return adapter_axis_names("/".join(parts[-4:-2]), parts[-1])
    for length in (3, 2):
        if (names := WEIGHT_AXES.get("/".join(parts[-length:]))) is not None:
            return names
    return (None,)


def adapter_axis_names(linear: str, leaf: str) -> tuple[str | None, ...]:
    """Logical axes of an adapter's `leaf` beside the kernel of `linear`: those it shares with the kernel, None for its
    rank.

    >>> adapter_axis_names("attn/o", "a"), adapter_axis_names("attn/q", "a")
    (('heads', 'head_dim', None), (None, None))
    """
    # Not sharded over `fsdp`: the matrices are small, and for sharded ones the partitioner inserts collective permutes
    # inside a pipeline's branch.
    kernel = tuple(None if name == "embed" else name for name in WEIGHT_AXES.get(f"{linear}/kernel", ()))
    inputs = 2 if linear == "attn/o" else 1
    shapes = {
        "a": (*kernel[:inputs], None),
        "b": (None, *kernel[inputs:]),
        "magnitude": kernel[inputs:],
        "output_scale": kernel[inputs:],
        "vera_b": kernel[inputs:],
        "input_scale": kernel[:inputs],
        "r": (None, None),
        "indices": (None, None),
        "down": (None, None),
        "up": (None, None),
    }
    return shapes.get(leaf, (None,))


def quantized_axis_names(linear: str, leaf: str) -> tuple[str | None, ...]:
    """Logical axes of a `leaf` of the quantized kernel of `linear`, whose inputs are flattened to the first of them.

    >>> quantized_axis_names("attn/o", "codes"), quantized_axis_names("attn/q", "scale_mean")
    (('heads', 'embed'), (None,))
    """
    kernel = WEIGHT_AXES[f"{linear}/kernel"]
    inputs = 2 if linear == "attn/o" else 1
    return (kernel[0], *kernel[inputs:]) if leaf in ("codes", "scale", "zero") else (None,)


def is_stacked(path: str) -> bool:
    """Whether the weight at `path` has a leading [repeats]."""
    return path.startswith(("segments/", "teacher/segments/"))
