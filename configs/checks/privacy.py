"""Settings that a private run may not have, because they would reveal more of its rows than `privacy` promises."""

from ..errors import UserError
from ..run_fields import RunFields

# Recipes whose loss of a row depends on that row alone.
PRIVATE_RECIPES = ("pretrain", "sft", "dpo", "ipo", "orpo", "simpo")
# Methods for which per-row gradient norms are computed; each is tested.
PRIVATE_ADAPTERS = ("lora", "dora", "ia3", "bitfit", "norms", "selective")
FLOAT32_ADAPTERS = (
    "lora",
    "dora",
    "ia3",
)  # of these: their weights are added, and float32 whatever `precision.parameters` is
SMALLEST_SEED = 2**32  # an attacker can try all seeds below it


def check_privacy(config: RunFields, axes: dict[str, int]) -> None:
    """Raise ValueError where a run on a mesh of `axes` cannot keep the promise of `privacy`."""
    data, recipe = config.data, config.recipe.name
    method = None if config.adapter is None else config.adapter.method
    wrong = {
        f"recipe.name: {recipe}": (recipe not in PRIVATE_RECIPES, f"use {', '.join(PRIVATE_RECIPES)}"),
        f"adapter.method: {method}": (
            method is not None and method not in PRIVATE_ADAPTERS,
            f"its per-row gradient norms are not computed: use {', '.join(PRIVATE_ADAPTERS)}",
        ),
        f"data.packing.method: {data.packing.method}": (
            data.packing.method != "single",
            "a row is the unit of privacy, so it must hold one document: use single",
        ),
        "data.mixture": (bool(data.mixture), "rows of a small source are read more often: use one source"),
        "data.streaming: true": (data.streaming, "the number of rows is unknown: set it to false"),
        "model.tied_embeddings: true": (
            config.model.tied_embeddings and method in (None, "selective"),
            "the gradient norm of a matrix that is used twice is not computed: add an adapter, e.g. lora",
        ),
        f"logging.spike: {config.logging.spike}": (
            config.logging.spike is not None,
            "a skipped step reveals something of its rows: set it to null",
        ),
        "elastic.deterministic: true": (config.elastic.deterministic, "set it to false"),
        f"precision.compute: {config.precision.compute}": (
            config.precision.compute != "float32",
            "gradient norms must not be rounded: use float32",
        ),
        f"precision.gradients: {config.precision.gradients}": (
            config.precision.gradients != "float32",
            "rounding after clipping can exceed the clip: use float32",
        ),
        f"precision.parameters: {config.precision.parameters}": (
            config.precision.parameters != "float32" and method not in FLOAT32_ADAPTERS,
            f"gradients of the model's weights would be rounded: use float32, or {', '.join(FLOAT32_ADAPTERS)}",
        ),
        f"memory.loss_chunks: {config.memory.loss_chunks}": (
            config.memory.loss_chunks > 1,
            "the norm of the head's gradient needs the whole row at once: use 1",
        ),
        "islands": (config.islands is not None, "noise is added in one job: set it to null"),
    }
    wrong |= {
        f"mesh.{axis}: {size}": (size > 1 and axis not in ("data", "fsdp"), "use mesh.data and mesh.fsdp")
        for axis, size in axes.items()
    }
    refuse_first(wrong)


def check_private_inputs(config: RunFields) -> None:
    """Raise UserError where the tokenizer or the seed of a run that is about to train would reveal its rows."""
    wrong = {
        "data.tokenizer.train: bpe": (
            config.data.tokenizer.train is not None,
            "a tokenizer that is trained on the rows reveals them: set data.tokenizer.file, or bytes",
        ),
        f"seed: {config.seed}": (
            config.seed < SMALLEST_SEED,
            "whoever knows or guesses the seed can subtract the noise: set a secret number, as "
            '`python -c "import secrets; print(secrets.randbits(63))"` draws it',
        ),
    }
    try:
        refuse_first(wrong)
    except ValueError as error:
        raise UserError(str(error)) from None


def refuse_first(wrong: dict[str, tuple[bool, str]]) -> None:
    """Raise ValueError for the first "key: value" whose condition is true, with its reason and remedy."""
    for key, (is_wrong, remedy) in wrong.items():
        if is_wrong:
            raise ValueError(f"{key} with privacy: {remedy}")
