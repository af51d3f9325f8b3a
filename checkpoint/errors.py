"""What a damaged checkpoint or snapshot raises. JAX-free."""

from ..configs.errors import MeshwrightError


class DamagedCheckpoint(MeshwrightError):
    """A checkpoint is not what was saved; the message says which array and block, or which file."""
