"""How replicas that train by themselves meet: the outer optimizer of `mesh.replica` > 1.

Each rule reads some of the keys and has defaults for those, from its paper; a key it does not read is refused.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from .base import Section

Wire = Literal["float32", "bf16", "fp8", "int8", "e3m0"]

# Rule -> the keys it reads beside `every`, with their defaults.
RULES: dict[str, dict[str, Any]] = {
    # arXiv:2311.08105
    "diloco": {"learning_rate": 0.7, "momentum": 0.9, "wire": "float32"},
    # arXiv:2501.18512: the learning rate was tuned at small scale, and kept
    "streaming": {"learning_rate": 0.4, "momentum": 0.9, "wire": "float32"}
    | {"fragments": 4, "order": "strided", "overlap": 1, "mix": 0.5},
    # arXiv:2506.10911; the consensus is the released code's
    "noloco": {"learning_rate": 0.7, "momentum": 0.5, "consensus": 0.7, "wire": "float32"} | {"routing": False},
    "local-sgd": {"wire": "float32"},
    # arXiv:2502.12996, with DiLoCo's numbers
    "eager": {"learning_rate": 0.7, "momentum": 0.9, "wire": "float32"},
    "peer-average": {"rate": 0.5, "wire": "float32"},
}
PAIRWISE_RULES = ("noloco", "peer-average")
# Formats of whole parameters; a drift is small and takes any.
PARAMETER_WIRES = ("float32", "bf16")


class OuterConfig(Section):
    """What the replicas exchange, and when. Defaults depend on the rule (`docs/lowcomm.md`)."""

    name: Literal[tuple(RULES)] = "diloco"  # type: ignore[valid-type]
    """The rule."""
    every: int = Field(30, ge=1)
    """Updates of each replica between two meetings (H)."""
    learning_rate: float | None = Field(None, gt=0)
    """Of the outer step; null: the rule's own."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """Of the outer step: Nesterov's, or NoLoCo's heavy ball; null: the rule's own."""
    consensus: float | None = Field(None, gt=0)
    """noloco: pull of a pair toward its mean (gamma)."""
    routing: bool | None = None
    """noloco: whether microbatches pass from a pipeline's stage to the next one's in a random replica."""
    rate: float | None = Field(None, gt=0, lt=1)
    """peer-average: share of the partner's parameters."""
    fragments: int | None = Field(None, ge=1)
    """streaming: parts that meet at different times; the first is what is no layer, the others share the layers."""
    order: Literal["strided", "sequential"] | None = None
    """streaming: how layers are dealt to fragments: every n-th, or neighbours."""
    overlap: int | None = Field(None, ge=0)
    """streaming: updates between sending a fragment and using what arrives (tau)."""
    mix: float | None = Field(None, ge=0, lt=1)
    """streaming: share of a replica's own parameters that stays when what arrives is mixed in (alpha)."""
    wire: Wire | None = None
    """Number format on the slow link; null: float32."""
    memory: Literal["device", "host"] = "device"
    """Where the outer state waits between meetings: beside the parameters, or in the host's pinned memory."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """The rule's defaults, under what is written."""
        if not isinstance(values, dict):
            return values
        written = {key: value for key, value in values.items() if value is not None}
        return RULES.get(written.get("name", "diloco"), {}) | written

    @model_validator(mode="after")
    def _consistent(self) -> "OuterConfig":
        read = RULES[self.name]
        for key in sorted(set().union(*RULES.values()) - read.keys()):
            if (value := getattr(self, key)) is not None:
                readers = [name for name, keys in RULES.items() if key in keys]
                raise ValueError(
                    f"outer.{key}: {value!r} means nothing to {self.name}; remove it (outer.{key}=null where another "
                    f"file sets it), or set outer.name to {' or '.join(readers)}"
                )
        if self.name == "streaming":
            if self.overlap >= self.every:
                raise ValueError(
                    f"outer.overlap: {self.overlap} must be below outer.every ({self.every}): what is sent has to "
                    "arrive before the fragment is sent again"
                )
            if self.fragments > self.every:
                raise ValueError(
                    f"outer.fragments: {self.fragments} exceeds outer.every ({self.every}); each needs its own turn"
                )
        if self.name == "peer-average" and self.wire not in PARAMETER_WIRES:
            raise ValueError(
                f"outer.wire: {self.wire} is too narrow for peer-average, which sends whole parameters; use "
                f"{' or '.join(PARAMETER_WIRES)}"
            )
        return self


def check_replicas(outer: OuterConfig | None, *, replicas: int, steps: int, layers: int, average: float | None) -> None:
    """Raise ValueError where `outer` and `mesh.replica` do not go together, or do not suit the rest of the run."""
    if outer is None:
        if replicas > 1:
            raise ValueError(
                f"mesh.replica: {replicas} replicas would never meet; add a section outer, e.g. outer.name=diloco, or "
                "use mesh.data"
            )
        return
    if replicas == 1:
        raise ValueError(
            f"outer: {outer.name} needs replicas to meet; set mesh.replica or islands.count to 2 or more, or outer to "
            "null"
        )
    if outer.every > steps:
        raise ValueError(f"outer.every: {outer.every} exceeds steps ({steps}): the replicas would never meet; lower it")
    if average is not None:
        raise ValueError(
            f"optimizer.ema: {average} beside outer: the outer parameters are what is evaluated; set it to null"
        )
    if outer.fragments is not None and outer.fragments - 1 > layers:
        raise ValueError(
            f"outer.fragments: {outer.fragments} are one for the ends and {outer.fragments - 1} for layers, and "
            f"model.layers is {layers}; use at most {layers + 1}"
        )
    if outer.consensus is not None:
        check_consensus(outer.consensus, momentum=outer.momentum, replicas=replicas)


def check_routing(*, pipe: int, replicas: int, vocab_parallel: int | None) -> None:
    """Raise ValueError where microbatches cannot pass from one replica's stage to another's."""
    if pipe == 1:
        raise ValueError(
            "outer.routing: true needs stages to pass between, and mesh.pipe is 1; raise it, or set outer.routing to "
            "false"
        )
    if replicas & (replicas - 1):
        raise ValueError(
            f"outer.routing: true swaps replicas in pairs, which {replicas} are not made of; set mesh.replica to a "
            "power of two, or outer.routing to false"
        )
    if vocab_parallel:
        raise ValueError(
            f"outer.routing: true beside pipeline.vocab_parallel ({vocab_parallel}), whose passes know a microbatch by "
            "its replica; set one of them to false or 0"
        )


def check_consensus(consensus: float, *, momentum: float, replicas: int) -> None:
    """Raise ValueError where NoLoCo's replicas would drift apart without bound (`largest_consensus`)."""
    largest = largest_consensus(momentum, replicas=replicas)
    if consensus >= largest:
        raise ValueError(
            f"outer.consensus: {consensus} makes {replicas} replicas with outer.momentum {momentum} drift apart; "
            f"stay below {largest:.3g}"
        )


def largest_consensus(momentum: float, *, replicas: int) -> float:
    """2 (1 - a^2) / (1 + a - 2 a k) with a the momentum: at and above it NoLoCo's variance does not settle.

    The anchors' spread follows a linear map of three second moments around the replicas' mean: V of the anchors, C of
    anchor with velocity, D of the velocity. Partners drawn uniformly are correlated by -1 / (R - 1), so with consensus
    g and k = R / (2 (R - 1)), or 1/2 where R is odd and one sits out, a meeting without drifts gives

        D' = a^2 D - 2 a g k C + g^2 k V;   C' = a C - g k V + D';   V' = V + 2 (a C - g k V) + D'

    whose largest eigenvalue is below 1 for g between 0 and this bound, and 1 at it.

    >>> round(largest_consensus(0.5, replicas=2), 3), round(largest_consensus(0.5, replicas=10**9), 3)
    (3.0, 1.5)
    """
    k = 1 / 2 if replicas % 2 else replicas / (2 * (replicas - 1))
    return 2 * (1 - momentum**2) / (1 + momentum - 2 * momentum * k)
