"""Checkpoints of trainings. `ocp` is Orbax, imported without its changes to the logging configuration."""

from pera_jax import calls

with calls.logging_unchanged():
    from orbax.checkpoint import v1 as ocp

__all__ = ["ocp"]
