"""Differential privacy: how much a run may tell of any one row, and what it may not be combined with."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from .base import Section
from .errors import UserError

if TYPE_CHECKING:
    from .run import RunConfig

# Recipes whose loss of a row depends on nothing but that row.
PRIVATE_RECIPES = ("pretrain", "sft", "dpo", "ipo", "orpo", "simpo")
# Methods whose weights are read by the linear maps that norms are made of, or are small; each is tested to be so.
PRIVATE_ADAPTERS = ("lora", "dora", "ia3", "bitfit", "norms", "selective")
BESIDE = ("lora", "dora", "ia3")  # of these: whose weights are new, and float32 whatever `precision.parameters` says
LEAST_SEED = 2**32  # those below are few enough to try them all


class PrivacyConfig(Section):
    """DP-SGD (arXiv:1607.00133): no row moves the sum of gradients by more than `clip`, and noise hides which did."""

    clip: float = Field(0.1, gt=0)
    """Largest norm of a row's gradient; larger ones are scaled down to it. Default: 0.1, of arXiv:2110.05679."""
    noise: float | None = Field(None, gt=0)
    """Standard deviation of the noise in the sum of a batch's gradients, in units of `clip`. Default: by `epsilon`."""
    epsilon: float | None = Field(None, gt=0)
    """What the whole run may spend; the noise is as small as that allows. Default: by `noise`."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """Probability that the bound does not hold; well below one over the number of rows. Default: 1e-5."""
    sampling: Literal["shuffled", "poisson"] = "shuffled"
    """What `epsilon` assumes. shuffled: what happens, each row once an epoch, and no credit for chance; poisson: that
    each batch draws each row by chance, as most reports do and no run of ours does. Default: shuffled."""

    @model_validator(mode="after")
    def _one(self) -> "PrivacyConfig":
        if (self.noise is None) is (self.epsilon is None):
            raise ValueError(
                f"privacy.noise: {self.noise} with privacy.epsilon: {self.epsilon}; set one of them: how much noise, "
                "or how much may be spent"
            )
        return self


def check_privacy(config: "RunConfig", axes: dict[str, int]) -> None:
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
            config.precision.parameters != "float32" and method not in BESIDE,
            f"gradients of the model's own weights would be rounded like them: use float32, or {', '.join(BESIDE)}",
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
    refuse(wrong)


def check_secret(config: "RunConfig") -> None:
    """Raise UserError where a run that is about to train would tell of its rows by what it begins with."""
    trained = config.data.tokenizer.train is not None
    wrong = {
        "data.tokenizer.train: bpe": (
            trained,
            "a tokenizer trained on the rows tells of them: set data.tokenizer.file, or bytes",
        ),
        f"seed: {config.seed}": (
            config.seed < LEAST_SEED,
            "whoever knows or guesses the seed can take the noise away: set a number of your own, as "
            '`python -c "import secrets; print(secrets.randbits(63))"` draws it, and tell nobody',
        ),
    }
    try:
        refuse(wrong)
    except ValueError as error:
        raise UserError(str(error)) from None


def refuse(wrong: dict[str, tuple[bool, str]]) -> None:
    """Raise ValueError at the first key and value that is so, with its remedy."""
    for key, (is_so, remedy) in wrong.items():
        if is_so:
            raise ValueError(f"{key} with privacy: {remedy}")
