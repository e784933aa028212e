"""What torch.save has written, read without running any of it.

The pickle may hold arrays, numbers, strings and containers, the NumPy scalars that optimisers leave in their settings, and
the options of a command, which become an object without use. Every name that it refers to is looked at before PyTorch sees it, and PyTorch's own reader (`weights_only`)
takes no other either.
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

_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # before NumPy 2, and since
_SETTINGS = "argparse.Namespace"  # a command's options, beside the arrays
_STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED = frozenset((
    *_SCALARS, "numpy.dtype", "_codecs.encode", "collections.OrderedDict", "torch.Size", "torch.device", _SETTINGS,
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch.storage.UntypedStorage",
    *(f"torch.{name}Storage" for name in _STORAGES),
))  # fmt: skip
# What damaged bytes make of zipfile, its decompressors and pickletools; MemoryError and OverflowError of absurd lengths.
_FILE_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, ValueError, EOFError, RuntimeError, LookupError,
                TypeError, AttributeError, MemoryError, OverflowError)  # fmt: skip
_TORCH_ERRORS = (*_FILE_ERRORS, pickle.UnpicklingError, ImportError, AssertionError, OSError)
_LARGEST_PICKLE = 1 << 28  # bytes; the arrays lie beside the pickle, which holds their names
_LEGACY_PICKLES = 5  # one after the other in a file that is no zip: magic number, version, system, content, storages


class _Settings:
    """Stands where the pickle has an argparse.Namespace: attributes, and nothing that acts."""


def load(path: pathlib.Path, verify: bool = True) -> Any:
    """The object in a file of torch.save, tensors on the CPU.

    Args:
      verify: compare the members of a zip, as torch.save writes them, with their checksums; PyTorch does not.

    Raises:
      UserError: a file that cannot be read, that refers to anything but arrays and numbers (all of it is named), that is
        cut off; PyTorch is not installed.
    """
    try:
        foreign = sorted({name for name in _globals(path) if name not in ALLOWED})
        damaged = _damaged_member(path) if verify and not foreign else None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except _FILE_ERRORS as error:
        raise UserError(f"{path} is no file of torch.save, or is cut off") from error
    if foreign:
        raise UserError(
            f"{path} refers to {several(foreign, 5)}, which is neither an array nor a number, and nothing of it was loaded; "
            "save the model's state_dict alone, as torch.save(torch.load(FILE, weights_only=False)['teacher'], OTHER) does "
            "where you trust the file"
        )
    if damaged:
        raise UserError(
            f"{path} is damaged: its member {printable(damaged)} differs from its checksum; take another copy of it, or, "
            "where it was written without checksums, read it with --no-verify"
        )
    try:
        import torch
    except ImportError as error:
        raise UserError(f"reading {path} needs PyTorch; pip install pera_jax[torch], or pip install torch") from error
    scalar = np._core.multiarray.scalar
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    allowed = [*((scalar, name) for name in _SCALARS), (_Settings, _SETTINGS), np.dtype, *dtypes]
    try:
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _TORCH_ERRORS as error:
        raise UserError(f"{path} is no file of torch.save, or is cut off") from error


def _damaged_member(path: pathlib.Path) -> str | None:
    """The first member of a zip that differs from its checksum; None where there is none, or no zip."""
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
    """All names `module.name` that the pickles of a file refer to. Nothing is executed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise UserError(f"{path} is compressed, which torch.save never does; unpack it and pack it without (zip -0)")
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
    texts: list[str] = []  # the newest are probably what STACK_GLOBAL takes its two names from
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            yield argument.replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            # PyTorch writes none, and these may not be the ones that a reader would find there: never allowed.
            yield f"{'.'.join(texts[-2:])} (by way of the stack)"
        elif isinstance(argument, str):
            texts.append(argument)
        elif opcode.name.startswith("EXT"):
            yield f"extension {argument}"
