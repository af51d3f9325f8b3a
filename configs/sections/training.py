"""The sections optimizer, evaluation, checkpoint and logging."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Section


class OptimizerConfig(Section):
    """The optimizer (from optax), its learning rate schedule, and gradient clipping."""

    name: Literal["adamw", "adam", "sgd", "lion", "adafactor", "muon"] = "adamw"
    """Update rule; muon (optax.contrib) updates the matrices of each layer, and adamw all other weights."""
    learning_rate: float = Field(1e-3, ge=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Learning rate after warm-up: constant; cosine or linear decay to `final_fraction`; wsd (warmup-stable-decay):
    constant, then decay over the last `decay_steps`."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up: update n has n / warmup_steps of the peak."""
    decay_steps: int | None = Field(None, ge=1)
    """wsd: steps of the final decay; null: a tenth of the run."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step over the peak."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of matrices; norms and biases never decay, embeddings only with `decay_embeddings`."""
    decay_embeddings: bool = False
    """Decay embedding tables too."""
    clip: float | None = Field(None, gt=0)
    """Global norm to which gradients are clipped; null: no clipping."""
    b1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of the first moment (adam); momentum (sgd, muon); weight of the momentum in an update (lion)."""
    b2: float = Field(0.95, ge=0, lt=1)
    """Decay rate of the second moment (adam) or of the momentum (lion)."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the denominator of the update."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the parameters, which evaluation and samples use; null: off."""


class EvaluationConfig(Section):
    """Held-out loss, samples and generated answers during the run."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only at the end."""
    start: bool = False
    """Evaluate before the first step too, as a baseline for fine-tuning."""
    batches: int | None = Field(None, ge=1)
    """How many held-out batches are evaluated; null: all."""
    prompts: list[str] = []
    """Prompts to continue at every evaluation; messages of a user where the data are conversations. []: none."""
    answers: int = Field(0, ge=0)
    """How many held-out questions to answer by greedy decoding, for exact match and `metrics`; 0: none."""
    metrics: list[str] = []
    """Further metrics of these answers, as module:function, e.g. scoring:length (`train/infer/generation_eval.py`)."""
    sample_tokens: int = Field(64, ge=1)
    """Length of a sample in tokens."""
    temperature: float = Field(0.8, ge=0)
    """Sampling temperature of samples; 0: greedy decoding, with which a young model repeats itself."""

    @model_validator(mode="after")
    def _metrics_have_answers(self) -> "EvaluationConfig":
        for name in self.metrics:
            if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
                raise ValueError(
                    f"evaluation.metrics: {name!r} is not of the form module:function, such as scoring:length"
                )
        if self.metrics and not self.answers:
            raise ValueError(
                f"evaluation.answers: 0, but evaluation.metrics {self.metrics} need answers; raise it, e.g. to 32"
            )
        return self


class CheckpointConfig(Section):
    """When the state is saved, and which checkpoints are kept."""

    every: Annotated[int, Field(ge=0)] | Literal["auto"] = 0
    """Steps between saves; 0: only at the end and on a signal; auto: Daly's optimal interval, from measured times."""
    keep: int = Field(3, ge=1)
    """How many of the newest checkpoints are kept."""
    keep_every: int = Field(0, ge=0)
    """Checkpoints at multiples of this step are kept too; 0: none."""
    keep_best: int = Field(0, ge=0)
    """How many checkpoints with the lowest held-out loss are kept too; 0: none."""
    memory_every: int = Field(0, ge=0)
    """Steps between snapshots in the host's memory (/dev/shm), from which a restart on that host resumes; 0: none."""
    when_busy: Literal["wait", "skip", "drop-oldest"] = "wait"
    """When a save is due and the last one is unfinished: wait for it, skip the new one, or replace the queued one."""
    parity: Literal["none", "xor", "p+q"] = "none"
    """Redundancy of host snapshots (`meshwright launch`): with xor a group survives the loss of one host, with p+q of
    two."""
    group: int = Field(8, ge=2)
    """Largest number of hosts of a parity group; each stores 1 / (hosts - 1) of a snapshot more with xor, 2 / (hosts -
    2) with p+q."""
    domains: list[str] = []
    """Failure domain (rack, switch, power supply) of each host; a group takes hosts of different ones. []: each host is
    its own."""
    on_failure: Literal["continue", "stop"] = "continue"
    """When a save fails (a full disk): log it and continue, or stop. A run whose last save failed exits with an
    error."""
    timeout: float = Field(600, gt=0)
    """Seconds after which a save to storage has failed (the storage hangs) and is no longer waited for."""
    compare: bool = False
    """Before each save, check that replicated arrays are equal bit for bit on all devices; stop if they are not (silent
    data corruption)."""


class ProfileConfig(Section):
    """A profiler trace of some steps, written to the run directory."""

    start: int = Field(10, ge=0)
    """First step of the trace."""
    steps: int = Field(0, ge=0)
    """Number of steps in the trace; 0: no trace."""


class LoggingConfig(Section):
    """What is logged, and what happens on a loss that is not finite."""

    every: int = Field(10, ge=1)
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb: str | None = None
    """Project on Weights & Biases (install the extra `wandb`); null: off."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one device in TFLOP/s, for MFU; null: from a table, on a CPU measured."""
    on_nan: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite: stop the run, or skip that update and log it."""
    spike: float | None = Field(None, gt=1)
    """Skip updates whose gradient norm exceeds this multiple of its running mean; null: off."""
    profile: ProfileConfig = ProfileConfig()
    """Profiler trace of some steps."""
    ledger: bool = False
    """Log which samples each process read at each step, for `meshwright audit`."""
