"""What a private run may not be combined with, and what would tell of its rows before it begins."""

from ..errors import UserError
from ..run_fields import RunFields

# Recipes whose loss of a row depends on nothing but that row.
PRIVATE_RECIPES = ("pretrain", "sft", "dpo", "ipo", "orpo", "simpo")
# Methods whose weights are read by the linear maps that norms are made of, or are small; each is tested to be so.
PRIVATE_ADAPTERS = ("lora", "dora", "ia3", "bitfit", "norms", "selective")
FLOAT32_ADAPTERS = (
    "lora",
    "dora",
    "ia3",
)  # of these: whose weights are new, and float32 whatever `precision.parameters` says
SMALLEST_SEED = 2**32  # those below are few enough to try them all


def check_privacy(config: RunFields, axes: dict[str, int]) -> None:
    """Raise ValueError where a run on a mesh of `axes` could not keep what `privacy` promises."""
    data, recipe = config.data, config.recipe.name
    method = None if config.adapter is None else config.adapter.method
    wrong = {
        f"recipe.name: {recipe}": (recipe not in PRIVATE_RECIPES, f"use {', '.join(PRIVATE_RECIPES)}"),
        f"adapter.method: {method}": (
            method is not None and method not in PRIVATE_ADAPTERS,
            f"norms of its gradients are not computed: use {', '.join(PRIVATE_ADAPTERS)}",
        ),
        f"data.packing.method: {data.packing.method}": (
            data.packing.method != "single",
            "the row is what is kept private, so it must hold one document: use single",
        ),
        "data.mixture": (bool(data.mixture), "a small source would be read more often: use one source"),
        "data.streaming: true": (data.streaming, "how many rows there are is not known: set it to false"),
        "model.tied_embeddings: true": (
            config.model.tied_embeddings and method in (None, "selective"),
            "norms of a matrix that is used twice are not computed: add an adapter, e.g. lora",
        ),
        f"logging.spike: {config.logging.spike}": (
            config.logging.spike is not None,
            "to skip a step tells of its rows: set it to null",
        ),
        "elastic.deterministic: true": (config.elastic.deterministic, "set it to false"),
        f"precision.compute: {config.precision.compute}": (
            config.precision.compute != "float32",
            "norms must not depend on how they are rounded: use float32",
        ),
        f"precision.gradients: {config.precision.gradients}": (
            config.precision.gradients != "float32",
            "sums that are rounded after they were clipped move by more than the clip: use float32",
        ),
        f"precision.parameters: {config.precision.parameters}": (
            config.precision.parameters != "float32" and method not in FLOAT32_ADAPTERS,
            f"gradients of the model's own weights would be rounded like them: use float32, or {', '.join(FLOAT32_ADAPTERS)}",
        ),
        f"memory.loss_chunks: {config.memory.loss_chunks}": (
            config.memory.loss_chunks > 1,
            "the norm of the head's gradient needs a whole row at once: use 1",
        ),
        "islands": (config.islands is not None, "train in one job"),
    }
    wrong |= {
        f"mesh.{axis}: {size}": (size > 1 and axis not in ("data", "fsdp"), "use mesh.data and mesh.fsdp")
        for axis, size in axes.items()
    }
    refuse_first(wrong)


def check_private_inputs(config: RunFields) -> None:
    """Raise UserError where a run that is about to train would tell of its rows by what it begins with."""
    trained = config.data.tokenizer.train is not None
    wrong = {
        "data.tokenizer.train: bpe": (
            trained,
            "a tokenizer trained on the rows tells of them: set data.tokenizer.file, or bytes",
        ),
        f"seed: {config.seed}": (
            config.seed < SMALLEST_SEED,
            "whoever knows or guesses the seed can take the noise away: set a number of your own, as "
            '`python -c "import secrets; print(secrets.randbits(63))"` draws it, and tell nobody',
        ),
    }
    try:
        refuse_first(wrong)
    except ValueError as error:
        raise UserError(str(error)) from None


def refuse_first(wrong: dict[str, tuple[bool, str]]) -> None:
    """Raise ValueError at the first key and value that is so, with its remedy."""
    for key, (is_so, remedy) in wrong.items():
        if is_so:
            raise ValueError(f"{key} with privacy: {remedy}")
