"""The error for a damaged checkpoint or snapshot. JAX-free."""

from ..configs.errors import MeshwrightError


class DamagedCheckpoint(MeshwrightError):
    """A checkpoint or snapshot differs from what was saved; the message names the array and block, or the file."""
