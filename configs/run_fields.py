"""The keys of a run, section by section; `run.py` adds the checks that need more than one section."""

from pydantic import Field

from .sections.adapter import AdapterConfig
from .sections.base import Section
from .sections.data import DataConfig
from .sections.fault_tolerance import ElasticConfig
from .sections.islands import IslandsConfig
from .sections.launch import LaunchConfig
from .sections.model import ModelConfig
from .sections.multi_adapter import NamedAdapterConfig
from .sections.outer import OuterConfig
from .sections.parallel import MemoryConfig, MeshConfig, PipelineConfig, PrecisionConfig, SequenceConfig
from .sections.privacy import PrivacyConfig
from .sections.quantization import QuantizationConfig
from .sections.recipe import RecipeConfig
from .sections.training import CheckpointConfig, EvaluationConfig, LoggingConfig, OptimizerConfig


class RunFields(Section):
    """One run: `runs/NAME/` holds everything it makes."""

    name: str = "run"
    """Directory under runs/."""
    seed: int = Field(0, ge=0)
    """Of initialization, order, dropout."""
    steps: int = Field(100, ge=1)
    """Optimizer updates."""
    microbatches: int = Field(1, ge=1)
    """Parts the global batch is computed in, one after another; the result does not depend on it."""
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    sequence: SequenceConfig = SequenceConfig()
    memory: MemoryConfig = MemoryConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    adapter: AdapterConfig | None = None
    """Train a few weights instead of all; null: all."""
    adapters: dict[str, NamedAdapterConfig] = {}
    """Several adapters by name, trained in one step on one base, each on rows of its own; {}: one, or none."""
    quantization: QuantizationConfig | None = None
    """Keep the weights that are not trained in few bits; null: as `precision.parameters` says."""
    outer: OuterConfig | None = None
    """How the replicas of `mesh.replica`, or the islands, meet; null: there is one."""
    islands: IslandsConfig | None = None
    """Replicas that are jobs of their own and meet over a network, instead of `mesh.replica`; null: none."""
    recipe: RecipeConfig = RecipeConfig()
    privacy: PrivacyConfig | None = None
    """Bound what the weights may tell of any one row; null: nothing is promised."""
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    elastic: ElasticConfig = ElasticConfig()
    launch: LaunchConfig = LaunchConfig()
    logging: LoggingConfig = LoggingConfig()
