"""The one function from a weight's path to the names of its dimensions."""

NAMES = {
    "embed/embedding": ("vocab", "embed"),
    "embed/positions": (None, "embed"),
    "head/kernel": ("embed", "vocab"),
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
}


def axis_names(path: str) -> tuple[str | None, ...]:
    """Logical names of the dimensions of the weight at `path`, without the leading `layers` of a stacked one.

    Norm scales and the biases of row-parallel maps have no name: `(None, ...)` means repeated everywhere.

    >>> axis_names("segments/0/0/block/attn/q/kernel")
    ('embed', 'heads', 'head_dim')
    """
    parts = path.split("/")
    for length in (3, 2):
        if (names := NAMES.get("/".join(parts[-length:]))) is not None:
            return names
    return (None,)


def stacked(path: str) -> bool:
    """Whether the weight at `path` has a leading [repeats]."""
    return path.startswith("segments/")
