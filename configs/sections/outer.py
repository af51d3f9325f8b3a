"""The section outer: the outer optimizer, which synchronizes replicas that train by themselves.

Each rule reads some of the keys, with defaults from its paper; a key that it does not read is refused.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from .base import Section, check_keys_are_read

Wire = Literal["float32", "bf16", "fp8", "int8", "e3m0"]

# Rule -> the keys it reads beside `every`, with their defaults.
RULES: dict[str, dict[str, Any]] = {
    # arXiv:2311.08105
    "diloco": {"learning_rate": 0.7, "momentum": 0.9, "wire": "float32"},
    # arXiv:2501.18512: the learning rate was tuned at small scale, and kept
    "streaming": {"learning_rate": 0.4, "momentum": 0.9, "wire": "float32"}
    | {"fragments": 4, "order": "strided", "overlap": 1, "mix": 0.5},
    # arXiv:2506.10911; `consensus` is that of the released code
    "noloco": {"learning_rate": 0.7, "momentum": 0.5, "consensus": 0.7, "wire": "float32"} | {"routing": False},
    "local-sgd": {"wire": "float32"},
    # arXiv:2502.12996, with the settings of DiLoCo
    "eager": {"learning_rate": 0.7, "momentum": 0.9, "wire": "float32"},
    "peer-average": {"rate": 0.5, "wire": "float32"},
}
PAIRWISE_RULES = ("noloco", "peer-average")
# Number formats that are precise enough for parameters; outer gradients are small and take any.
PARAMETER_WIRES = ("float32", "bf16")


class OuterConfig(Section):
    """What replicas exchange, and when. Defaults depend on the rule (`docs/lowcomm.md`)."""

    name: Literal[tuple(RULES)] = "diloco"  # type: ignore[valid-type]
    """Rule of the outer step."""
    every: int = Field(30, ge=1)
    """Updates of each replica between two outer steps (H)."""
    learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the outer step; null: the rule's default."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """Momentum of the outer step (Nesterov; for noloco heavy ball); null: the rule's default."""
    consensus: float | None = Field(None, gt=0)
    """noloco: strength of the pull of a pair toward its mean (gamma); null: the rule's default."""
    routing: bool | None = None
    """noloco: pass each microbatch from a pipeline stage to the next stage of a random replica; null: false."""
    rate: float | None = Field(None, gt=0, lt=1)
    """peer-average: weight of the partner's parameters; null: the rule's default."""
    fragments: int | None = Field(None, ge=1)
    """streaming: number of fragments, which synchronize at different times; the first has all weights outside of
    layers, the others share the layers. null: the rule's default."""
    order: Literal["strided", "sequential"] | None = None
    """streaming: how layers are assigned to fragments: every n-th layer, or consecutive ones; null: strided."""
    overlap: int | None = Field(None, ge=0)
    """streaming: updates between sending a fragment and applying what arrives (tau); null: the rule's default."""
    mix: float | None = Field(None, ge=0, lt=1)
    """streaming: weight of the replica's own parameters when the synchronized ones are mixed in (alpha); null: the
    rule's default."""
    wire: Wire | None = None
    """Number format of what is sent; null: float32."""
    memory: Literal["device", "host"] = "device"
    """Where the outer state is kept between outer steps: on the device, or in the host's pinned memory."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """Fill keys that are not set with the rule's defaults."""
        if not isinstance(values, dict):
            return values
        written = {key: value for key, value in values.items() if value is not None}
        return RULES.get(written.get("name", "diloco"), {}) | written

    @model_validator(mode="after")
    def _consistent(self) -> "OuterConfig":
        check_keys_are_read(self, "outer", selector="name", readers=RULES)
        if self.name == "streaming":
            if self.overlap >= self.every:
                raise ValueError(
                    f"outer.overlap: {self.overlap} must be below outer.every ({self.every}), because a fragment must "
                    "arrive before it is sent again"
                )
            if self.fragments > self.every:
                raise ValueError(
                    f"outer.fragments: {self.fragments} exceeds outer.every ({self.every}); use at most one per update"
                )
        if self.name == "peer-average" and self.wire not in PARAMETER_WIRES:
            raise ValueError(
                f"outer.wire: {self.wire} is too coarse for outer.name peer-average, which sends parameters; use "
                f"{' or '.join(PARAMETER_WIRES)}"
            )
        return self


def check_replicas(outer: OuterConfig | None, *, replicas: int, steps: int, layers: int, average: float | None) -> None:
    """Raise ValueError where `outer` conflicts with `mesh.replica` or the rest of the run."""
    if outer is None:
        if replicas > 1:
            raise ValueError(
                f"mesh.replica: {replicas} replicas never synchronize without the section outer; add it, e.g. "
                "outer.name=diloco, or use mesh.data"
            )
        return
    if replicas == 1:
        raise ValueError(
            f"outer.name: {outer.name} with one replica; raise mesh.replica or islands.count, or set outer to null"
        )
    if outer.every > steps:
        raise ValueError(f"outer.every: {outer.every} exceeds steps ({steps}), so replicas never synchronize; lower it")
    if average is not None:
        raise ValueError(
            f"optimizer.ema: {average} with outer, where the outer parameters are evaluated; set it to null"
        )
    if outer.fragments is not None and outer.fragments - 1 > layers:
        raise ValueError(
            f"outer.fragments: {outer.fragments} are 1 for embedding and head and {outer.fragments - 1} for layers, "
            f"but model.layers is {layers}; use at most {layers + 1}"
        )
    if outer.consensus is not None:
        check_consensus(outer.consensus, momentum=outer.momentum, replicas=replicas)


def check_routing(*, pipe: int, replicas: int, vocab_parallel: int | None) -> None:
    """Raise ValueError where microbatches cannot pass from the stage of one replica to that of another."""
    if pipe == 1:
        raise ValueError(
            "outer.routing: true passes microbatches between pipeline stages, but mesh.pipe is 1; raise it, or set "
            "outer.routing to false"
        )
    if replicas & (replicas - 1):
        raise ValueError(
            f"outer.routing: true needs a power of two of replicas, but mesh.replica is {replicas}; change it, or set "
            "outer.routing to false"
        )
    if vocab_parallel:
        raise ValueError(
            f"outer.routing: true with pipeline.vocab_parallel ({vocab_parallel}), whose passes keep each microbatch "
            "in its replica; set outer.routing to false, or pipeline.vocab_parallel to 0"
        )


def check_consensus(consensus: float, *, momentum: float, replicas: int) -> None:
    """Raise ValueError where the replicas of NoLoCo would diverge (`largest_consensus`)."""
    largest = largest_consensus(momentum, replicas=replicas)
    if consensus >= largest:
        raise ValueError(
            f"outer.consensus: {consensus} makes {replicas} replicas with outer.momentum {momentum} diverge; use a "
            f"value below {largest:.3g}"
        )


def largest_consensus(momentum: float, *, replicas: int) -> float:
    """2 (1 - a^2) / (1 + a - 2 a k) with a the momentum: at and above it the variance of NoLoCo's replicas diverges.

    An outer step maps three second moments around the replicas' mean linearly: V of the anchors, C of anchor with
    velocity, D of the velocity. Partners drawn uniformly are correlated by -1 / (R - 1), so with consensus g and k = R
    / (2 (R - 1)), or 1/2 where R is odd and one replica pauses, an outer step without outer gradients gives

        D' = a^2 D - 2 a g k C + g^2 k V;   C' = a C - g k V + D';   V' = V + 2 (a C - g k V) + D'

    whose largest eigenvalue is below 1 for g between 0 and this bound, and 1 at it.

    >>> round(largest_consensus(0.5, replicas=2), 3), round(largest_consensus(0.5, replicas=10**9), 3)
    (3.0, 1.5)
    """
    k = 1 / 2 if replicas % 2 else replicas / (2 * (replicas - 1))
    return 2 * (1 - momentum**2) / (1 + momentum - 2 * momentum * k)
