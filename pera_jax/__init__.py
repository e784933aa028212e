"""Pre-training of vision transformers on remote sensing images in JAX.

    import pera_jax

    pera_jax.train(config="demo", data="shards/aid", workdir="runs/aid", changes={"total": "100 steps"})
    pera_jax.probe("runs/aid", ["knn"], data="shards/aid")
    model = pera_jax.features.load("runs/aid")

Modules are imported on first use: `import pera_jax` alone does not import JAX. Wrong input raises
`pera_jax.UserError`, whose message names the fix.
"""

import importlib

from pera_jax.common import interrupts
from pera_jax.common.errors import UserError

interrupts.guard_imports()

__all__ = ["UserError", "features", "probe", "train"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
