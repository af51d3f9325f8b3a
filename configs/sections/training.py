"""How the run goes: optimizer, evaluation, checkpoints, logging."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Section


class OptimizerConfig(Section):
    """The optimizer (from optax), its schedule, and what is done to gradients before it."""

    name: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = "adamw"
    """Update rule; muon (optax.contrib) takes per-layer matrices and leaves the rest to adamw."""
    learning_rate: float = Field(1e-3, ge=0)
    """Peak."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """After warm-up: constant, cosine or linear to `final_fraction`, or wsd: stable until a drop over `decay_steps`."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up: update n of them has n / warmup_steps of the peak."""
    decay_steps: int | None = Field(None, ge=1)
    """wsd: steps of the final drop; null: a tenth of the run."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step over the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled; applied to matrices, never to norms, biases or embeddings unless `decay_embeddings`."""
    decay_embeddings: bool = False
    """Also decay embedding tables."""
    clip: float | None = Field(None, gt=0)
    """Global gradient norm above which gradients are scaled down; null: off."""
    b1: float = Field(0.9, ge=0, lt=1)
    """First moment (adam, lion), momentum (sgd, muon)."""
    b2: float = Field(0.95, ge=0, lt=1)
    """Second moment (adam), update mix (lion)."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the parameters, used for evaluation and samples; null: off."""


class EvaluationConfig(Section):
    """Held-out loss and samples during the run."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only at the end."""
    start: bool = False
    """Also before the first step: what fine-tuning is compared with."""
    batches: int | None = Field(None, ge=1)
    """Held-out batches; null: all."""
    prompts: list[str] = []
    """Texts to continue at every evaluation; where conversations are learned, what a user says."""
    answers: int = Field(0, ge=0)
    """Held-out questions to answer with the likeliest tokens, for exact match and `metrics`; 0: none."""
    metrics: list[str] = []
    """Your own measures of these answers, as module:function, e.g. scoring:length (train/infer/generation_eval.py)."""
    sample_tokens: int = Field(64, ge=1)
    """Tokens a sample gets."""
    temperature: float = Field(0.8, ge=0)
    """Of the samples; 0: always the likeliest token, which repeats itself in a young model."""

    @model_validator(mode="after")
    def _metrics_have_answers(self) -> "EvaluationConfig":
        for name in self.metrics:
            if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
                raise ValueError(f"evaluation.metrics: {name!r} is not of the form module:function")
        if self.metrics and not self.answers:
            raise ValueError(
                f"evaluation.answers: 0, but evaluation.metrics {self.metrics} measure answers; set e.g. 32"
            )
        return self


class CheckpointConfig(Section):
    """When the whole state is saved, and what is kept."""

    every: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Steps between saves; 0: only at the end and on a signal; auto: Daly's interval, from what the run measured."""
    keep: int = Field(3, ge=1)
    """Newest checkpoints that survive."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints of multiples of this step survive too; 0: none."""
    keep_best: int = Field(0, ge=0)
    """So do this many with the lowest held-out loss, where one was evaluated at their step."""
    memory_every: int = Field(0, ge=0)
    """Steps between snapshots in the host's memory (/dev/shm), which a restart on that host goes on from; 0: none."""
    when_busy: Literal["wait", "skip", "drop-oldest"] = "wait"
    """A save is due and the one before it is not finished: wait for it, skip the new one, or replace what waits."""
    parity: Literal["none", "xor", "p+q"] = "none"
    """What hosts keep of each other's snapshots (`meshwright launch`): xor bears one lost host of a group, p+q two."""
    group: int = Field(8, ge=2)
    """Hosts of a group at most; each stores 1 / (hosts - 1) of a snapshot extra with xor, 2 / (hosts - 2) with p+q."""
    domains: list[str] = []
    """Failure domain (rack, switch, power supply) of each host, dealt to different groups; []: each its own."""
    on_failure: Literal["continue", "stop"] = "continue"
    """A save that failed (a full disk): journal it and train on, or stop. A run whose last save failed fails."""
    timeout: float = Field(600, gt=0)
    """Seconds for a save to storage; one that takes longer (storage that hangs) has failed and is not waited for."""
    compare: bool = False
    """Before each save, whether what several devices hold of the state is the same bits; stop where it is not."""


class ProfileConfig(Section):
    """A profiler trace of a few steps, written to the run directory."""

    start: int = Field(10, ge=0)
    """First step traced."""
    steps: int = Field(0, ge=0)
    """Steps traced; 0: no trace."""


class LoggingConfig(Section):
    """What the run tells, and what it does about numbers that are not."""

    every: int = Field(10, ge=1)
    """Steps between metric lines."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str | None = None
    """Project on Weights & Biases (extra `wandb`); null: off."""
    peak_tflops: float | None = Field(None, gt=0)
    """Of one device, for MFU; null: from a table, or measured on a CPU."""
    on_nan: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or skip that update and journal it."""
    spike: float | None = Field(None, gt=1)
    """Skip updates whose gradient norm exceeds this multiple of its running mean; null: off."""
    profile: ProfileConfig = ProfileConfig()
    """Profiler trace."""
    ledger: bool = False
    """Each process writes which samples it fed to which step, for `meshwright audit`."""
