"""The config: fields and defaults (`defaults`), checks (`check`), reading (`load`, `run_file`), fields' old names (`renamed`)."""

from pera_jax.config.check import PATHS, check
from pera_jax.config.defaults import default, finish, limit_groups, smoke
from pera_jax.config.load import load

__all__ = ["PATHS", "check", "default", "finish", "limit_groups", "load", "smoke"]
