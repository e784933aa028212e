"""Reads torch.save files without executing code from them.

The pickle may contain arrays, numbers, strings and containers, NumPy scalars (from optimizer settings), and an
argparse.Namespace, which is read as an inert object. Every global name in the pickle is checked against `ALLOWED`
before PyTorch reads the file, and PyTorch reads it with `weights_only`.
"""

import lzma
import pathlib
import pickle
import pickletools
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from pera_jax.common.errors import UserError
from pera_jax.common.text import printable, several

_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # before NumPy 2, and since NumPy 2
_SETTINGS = "argparse.Namespace"  # command-line options of a training, stored with the arrays
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = frozenset((
    *_SCALARS, "numpy.dtype", "_codecs.encode", "collections.OrderedDict", "torch.Size", "torch.device", _SETTINGS,
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.storage.UntypedStorage",
    *(f"torch.{name}Storage" for name in _STORAGES),
))  # fmt: skip
# Raised by zipfile, its decompressors and pickletools on damaged files; MemoryError and OverflowError on absurd
# lengths.
_FILE_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, ValueError, EOFError, RuntimeError,
                LookupError, TypeError, AttributeError, MemoryError, OverflowError)  # fmt: skip
_TORCH_ERRORS = (*_FILE_ERRORS, pickle.UnpicklingError, ImportError, AssertionError, OSError)
_LARGEST_PICKLE = 1 << 28  # bytes; the pickle has only the names, the arrays are stored beside it
_LEGACY_PICKLES = 5  # in a file that is not a zip: magic number, version, system, content, storages


class _Settings:
    """Inert stand-in for an argparse.Namespace in the pickle."""


def load(path: pathlib.Path, verify: bool = True) -> Any:
    """Loads the object in a torch.save file, with tensors on the CPU.

    Args:
      verify: check the CRC of each member of the zip file; PyTorch does not.

    Raises:
      UserError: a file that cannot be read, is truncated, or refers to anything but arrays and numbers; PyTorch is not
        installed.
    """
    try:
        foreign = sorted({name for name in _globals(path) if name not in ALLOWED})
        damaged = _damaged_member(path) if verify and not foreign else None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except _FILE_ERRORS as error:
        raise UserError(f"{path} is not a torch.save file, or is truncated; get another copy") from error
    if foreign:
        raise UserError(
            f"{path} refers to {several(foreign, 5)}, which is not an array or a number, so nothing was loaded; save "
            "only the model's state_dict, e.g. torch.save(torch.load(FILE, weights_only=False)['teacher'], OTHER) if "
            "you trust the file"
        )
    if damaged:
        raise UserError(
            f"{path} is damaged: its member {printable(damaged)} does not match its checksum; get another copy, or use "
            "--no-verify if the file was written without checksums"
        )
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"reading {path} needs PyTorch; run pip install pera_jax[torch] or pip install torch"
        ) from error
    scalar = np._core.multiarray.scalar
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    allowed = [*((scalar, name) for name in _SCALARS), (_Settings, _SETTINGS), np.dtype, *dtypes]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _TORCH_ERRORS as error:
        raise UserError(f"{path} is not a torch.save file, or is truncated; get another copy") from error


def _damaged_member(path: pathlib.Path) -> str | None:
    """The first member of a zip file that does not match its CRC; None if all match or the file is not a zip."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            try:
                with archive.open(member) as file:
                    while file.read(1 << 20):
                        pass
            except (zipfile.BadZipFile, zlib.error):
                return member.filename
    return None


def _globals(path: pathlib.Path) -> Iterator[str]:
    """All global names `module.name` in the pickles of a file. Executes nothing."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise UserError(
                    f"{path} is a compressed zip, which torch.save never writes; repack it without compression (zip -0)"
                )
            pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
            if not pickles:
                raise ValueError("a zip without a pickle")
            if max(archive.getinfo(name).file_size for name in pickles) > _LARGEST_PICKLE:
                raise ValueError("a pickle without end")
            for name in pickles:
                with archive.open(name) as file:
                    yield from _globals_of_one(file)
        return
    with open(path, "rb") as file:
        for number in range(_LEGACY_PICKLES):
            if number and not file.peek(1):  # a plain pickle
                return
            yield from _globals_of_one(file)


def _globals_of_one(file: BinaryIO) -> Iterator[str]:
    texts: list[str] = []  # STACK_GLOBAL probably takes its two names from the latest ones
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            # PyTorch never writes STACK_GLOBAL, and the names may not be those on the stack: never allowed.
            yield f"{'.'.join(texts[-2:])} (from the stack)"
        elif isinstance(argument, str):
            texts.append(argument)
        elif opcode.name.startswith("EXT"):
            yield f"extension {argument}"
