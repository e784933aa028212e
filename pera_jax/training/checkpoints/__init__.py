"""Checkpoints of trainings. `ocp` is Orbax, whose import logs: here it leaves the program's logging as it is."""

from pera_jax import calls

with calls.logging_unchanged():
    from orbax.checkpoint import v1 as ocp

__all__ = ["ocp"]
