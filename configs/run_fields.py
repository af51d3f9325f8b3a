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
    """Seed of initialization, data order and dropout."""
    steps: int = Field(100, ge=1)
    """Number of optimizer updates."""
    microbatches: int = Field(1, ge=1)
    """Number of parts in which the global batch is computed, one after another; the result does not depend on it."""
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig()
    pipeline: PipelineConfig = PipelineConfig()
    sequence: SequenceConfig = SequenceConfig()
    memory: MemoryConfig = MemoryConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    adapter: AdapterConfig | None = None
    """Train an adapter or a part of the weights; null: all weights."""
    adapters: dict[str, NamedAdapterConfig] = {}
    """Name -> one of several adapters, trained together on one base model, each on its own rows; {}: one, or none."""
    quantization: QuantizationConfig | None = None
    """Quantize the frozen weights; null: store them as `precision.parameters`."""
    outer: OuterConfig | None = None
    """How the replicas of `mesh.replica`, or the islands, synchronize; null: there is one."""
    islands: IslandsConfig | None = None
    """Replicas that are jobs of their own and synchronize over a network, in place of `mesh.replica`; null: none."""
    recipe: RecipeConfig = RecipeConfig()
    privacy: PrivacyConfig | None = None
    """Differential privacy for each row of the data; null: none."""
    data: DataConfig = DataConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    elastic: ElasticConfig = ElasticConfig()
    launch: LaunchConfig = LaunchConfig()
    logging: LoggingConfig = LoggingConfig()
