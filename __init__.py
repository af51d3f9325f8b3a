"""Meshwright: train and fine-tune Flax models in JAX on a sharded mesh, from one YAML file."""

__version__ = "0.1.0"
