"""Opening scenes with rasterio: keeps a few open, and converts exceptions to a single type."""

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from pera_jax.common.environment import EnvironmentFault, environment_fault, passing
from pera_jax.common.errors import UserError
from pera_jax.common.text import first_line, printable
from pera_jax.data import codecs

ENDINGS = (".tif", ".tiff")
OPEN_SCENES = 16  # kept open per process
_CACHE = 256  # MB


def require_rasterio() -> None:
    """Raises UserError if rasterio is not installed."""
    try:
        import rasterio  # noqa: F401
    except ImportError as error:
        raise UserError("scenes require rasterio; run pip install pera_jax[scenes], or pip install rasterio") from error


@functools.lru_cache(maxsize=OPEN_SCENES)
def opened(path: str) -> Any:
    """The open file, a rasterio dataset. Raises as `reasons`."""
    # GDAL's block cache for all open scenes; the default is 5 % of the memory, per process.
    os.environ.setdefault("GDAL_CACHEMAX", str(_CACHE))
    import rasterio

    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise codecs.ImageDecodeError("is empty")
    # Restricts the driver: by content, a .tif file could be any GDAL format, even a list of other files and URLs.
    driver = "GTiff" if path.lower().endswith(ENDINGS) else None
    with reasons(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(path, driver=driver)


@contextlib.contextmanager
def reasons(path: str) -> Iterator[None]:
    """Converts exceptions of rasterio to ImageDecodeError with the first line of GDAL's message, and hides GDAL's
    warnings.

    Failures of the machine become EnvironmentFault.
    """
    import rasterio

    # If rasterio cannot decode a GDAL message, Cython prints the error through both hooks and continues.
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook, sys.unraisablehook = _silent, functools.partial(_unraisable, hooks[1])
    try:
        with rasterio.Env():
            yield
    except codecs.ImageDecodeError:
        raise
    except Exception as error:  # for damaged files, rasterio raises almost any exception
        if passing(error):
            raise EnvironmentFault(f"{printable(path)} cannot be read: {environment_fault(error)}") from error
        cause = error.__cause__ or error  # rasterio's own message is "Read failed. See previous exception for details."
        raise codecs.ImageDecodeError(first_line(cause)) from error
    finally:
        sys.excepthook, sys.unraisablehook = hooks


def _silent(*_: Any) -> None:
    """An `excepthook` that prints nothing; no fatal exception can reach it."""


def _unraisable(hook: Callable, what: Any) -> None:
    """Forwards everything that does not come from rasterio."""
    if "rasterio" not in str(what.object):
        hook(what)
