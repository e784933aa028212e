"""Opening scenes with rasterio: a few stay open, and what is raised on damaged files becomes one error."""

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from pera_jax.common.environment import EnvironmentFault, environment_fault, passing
from pera_jax.common.errors import UserError
from pera_jax.common.text import printable
from pera_jax.data import codecs

ENDINGS = (".tif", ".tiff")
OPEN_SCENES = 16  # that a process keeps open
_CACHE = 256  # MB


def require_rasterio() -> None:
    """Raises UserError where rasterio is not installed."""
    try:
        import rasterio  # noqa: F401
    except ImportError as error:
        raise UserError("scenes need rasterio; pip install pera_jax[scenes], or pip install rasterio") from error


@functools.lru_cache(maxsize=OPEN_SCENES)
def opened(path: str) -> Any:
    """The open file, a rasterio dataset. Raises as `reasons` does."""
    # GDAL's cache of decoded blocks, of all open scenes: by default a twentieth of the memory, for each process.
    os.environ.setdefault("GDAL_CACHEMAX", str(_CACHE))
    import rasterio

    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise codecs.ImageDecodeError("is empty")
    # By its content a file called .tif could be anything that GDAL knows, also a list of other files and addresses.
    driver = "GTiff" if path.lower().endswith(ENDINGS) else None
    with reasons(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, driver=driver)


@contextlib.contextmanager
def reasons(path: str) -> Iterator[None]:
    """Turns what rasterio raises on files that are missing or damaged into ImageDecodeError, with GDAL's first line, and
    keeps GDAL's warnings from the terminal. Faults of the machine are raised as EnvironmentFault."""
    import rasterio

    # Where rasterio cannot decode what GDAL says of a damaged file, Cython prints the error by both hooks and goes on.
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook, sys.unraisablehook = _silent, functools.partial(_unraisable, hooks[1])
    try:
        with rasterio.Env():
            yield
    except codecs.ImageDecodeError:
        raise
    except Exception as error:  # on damaged files rasterio's many properties raise nearly anything
        if passing(error):
            raise EnvironmentFault(f"{printable(path)} cannot be read: {environment_fault(error)}") from error
        cause = error.__cause__ or error  # rasterio itself says "Read failed. See previous exception for details."
        lines = str(cause).splitlines() or [type(cause).__name__]
        raise codecs.ImageDecodeError(printable(lines[0])) from error
    finally:
        sys.excepthook, sys.unraisablehook = hooks


def _silent(*_: Any) -> None:
    """An `excepthook` for where nothing that ends the program can reach it."""


def _unraisable(hook: Callable, what: Any) -> None:
    """Passes on what does not come from rasterio."""
    if "rasterio" not in str(what.object):
        hook(what)
