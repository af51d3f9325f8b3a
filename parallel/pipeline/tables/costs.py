"""The cost of each op, in any one unit of time. Read from a YAML or JSON file, where a misspelt key is an error.

A cost is that of all layers of one device for one microbatch. A chunk of a device with two chunks costs half of it, so
schedules with different numbers of chunks are compared for the same model.
"""

from pathlib import Path

from pydantic import NonNegativeFloat, ValidationError

from ....configs.errors import UserError
from ....configs.loader import parse_yaml
from ....configs.sections.base import Section
from .table import Op, Table


class Costs(Section):
    """Time of each op; by default all cost the same, as the tables assume."""

    forward: NonNegativeFloat = 1.0
    """F of a device's layers."""
    input_gradient: NonNegativeFloat = 1.0
    """I of a device's layers."""
    weight_gradient: NonNegativeFloat = 1.0
    """W of a device's layers."""
    vocabulary_s: NonNegativeFloat | None = None
    """One S, of a device's shard of the vocabulary; default the F of one stage."""
    vocabulary_t: NonNegativeFloat | None = None
    """One T; default the F of one stage."""
    communication: NonNegativeFloat = 0.0
    """From the end of a pass until another device can use its result."""
    head_forward: NonNegativeFloat = 0.0
    """What the whole head adds to the last stage's F where the vocabulary is not sharded."""
    head_input_gradient: NonNegativeFloat = 0.0
    """What it adds to the last stage's I."""
    head_weight_gradient: NonNegativeFloat = 0.0
    """What it adds to the last stage's W."""
    tick: NonNegativeFloat = 0.0
    """What a lock-step tick costs when nobody has anything to do."""
    stages: tuple[NonNegativeFloat, ...] | None = None
    """Factor of each stage on F, I and W, for uneven layers; default 1."""

    def pass_time(self, op: Op, *, stage: int | None, table: Table) -> float:
        """The time of one pass; `stage` is None for S and T."""
        if stage is None:
            vocabulary = {Op.S: self.vocabulary_s, Op.T: self.vocabulary_t}[op]
            return self.forward / table.chunks if vocabulary is None else vocabulary
        layers = {Op.F: self.forward, Op.I: self.input_gradient, Op.W: self.weight_gradient}
        head = {Op.F: self.head_forward, Op.I: self.head_input_gradient, Op.W: self.head_weight_gradient}
        parts = (Op.I, Op.W) if op is Op.B else (op,)
        time = sum(layers[part] for part in parts) / table.chunks * (self.stages[stage] if self.stages else 1.0)
        has_head = stage == table.stages - 1 and not table.algorithm
        return time + (sum(head[part] for part in parts) if has_head else 0.0)


def read_costs(path: Path) -> Costs:
    """The costs in a file. Raises UserError naming file and key."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), origin=f"--costs {path}")  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--costs {path}: {error}; give a YAML or JSON file of costs") from error
    if not isinstance(tree, dict):
        raise UserError(f"--costs {path}: {type(tree).__name__}; give a mapping such as {{forward: 1.0}}")
    if unknown := tree.keys() - Costs.model_fields.keys():
        raise UserError.no_match(f"--costs {path}", map(str, unknown), candidates=Costs.model_fields)
    try:
        return Costs.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"--costs {path}: {key}: {first['input']!r}; {first['msg']}") from error
