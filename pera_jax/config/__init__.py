"""The config: fields and defaults (`defaults`), checks (`check`), reading (`load`, `run_file`, `flags`), old names
(`renamed`)."""

from pera_jax.config.check import PATHS, check, check_fields
from pera_jax.config.defaults import default, finish, limit_groups, smoke
from pera_jax.config.load import assignment, find, load, names

__all__ = [
    "PATHS",
    "assignment",
    "check",
    "check_fields",
    "default",
    "find",
    "finish",
    "limit_groups",
    "load",
    "names",
    "smoke",
]
