"""Named arrays in a file: safetensors, or a dictionary that torch.save has written."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from pera_jax import files
from pera_jax.common.text import several
from pera_jax.errors import UserError
from pera_jax.weights import pickles
from pera_jax.weights.tables import NAMED

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_MOST_DIMENSIONS = 8  # a convolution over space and time has 5; NumPy takes 64
_MOST_VALUES = 1 << 40  # of one array, also of one that holds none because a side is 0
_ENTRIES = ("model", "state_dict")  # where training programs keep the parameters beside other things


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The parameters in a file as float32, by name; a prefix `module.` of all names is dropped.

    Args:
      path: NAME.safetensors, else a file of torch.save: with a dictionary of arrays, by itself or as its entry `model`
        or `state_dict`.

    Raises:
      UserError: no such file, or damaged; entries that are no arrays of floats, all of which are named; as `pickles.load`.
    """
    named = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    if named and all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): array for name, array in named.items()}
    return named


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes NAME.safetensors, whole or not at all: the same bytes for the same arrays. Raises OSError."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    files.write(path, safetensors.numpy.save(contiguous, {"format": "pt"}))


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        stored = dict(safetensors.deserialize(path.read_bytes()))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is no safetensors file, or is cut off ({error})") from error
    _refuse(path, [name for name, each in stored.items() if each["dtype"] not in _DTYPES])
    _refuse_shapes(path, {name: each["shape"] for name, each in stored.items()})
    return {
        name: np.frombuffer(each["data"], _DTYPES[each["dtype"]]).reshape(each["shape"]).astype(np.float32)
        for name, each in stored.items()
    }


def _torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    held: Any = pickles.load(path)
    import torch

    if not isinstance(held, dict):
        raise UserError(f"{path} holds no dictionary of parameters but a {type(held).__name__}")
    held = next((held[entry] for entry in _ENTRIES if isinstance(held.get(entry), dict)), held)
    _refuse(path, [str(k) for k, v in held.items() if not (isinstance(v, torch.Tensor) and v.is_floating_point())])
    _refuse_shapes(path, {str(name): tensor.shape for name, tensor in held.items()})
    # A stride of 0 makes a terabyte of one number, which the first copy would ask of the memory.
    spread = [str(k) for k, v in held.items() if v.numel() * v.element_size() > v.untyped_storage().nbytes()]
    if spread:
        raise UserError(f"{path} holds arrays that are larger than what is stored of them: {several(sorted(spread), NAMED)}")
    return {str(name): tensor.detach().float().numpy() for name, tensor in held.items()}


def _refuse_shapes(path: pathlib.Path, shapes: dict[str, Sequence[int]]) -> None:
    absurd = [
        f"{name} {list(shape[:_MOST_DIMENSIONS])}" + (f" and so on, {len(shape)} dimensions" if len(shape) > _MOST_DIMENSIONS else "")
        for name, shape in shapes.items()
        if len(shape) > _MOST_DIMENSIONS or math.prod(side or 1 for side in shape) > _MOST_VALUES
    ]
    if absurd:
        raise UserError(f"{path} holds arrays of shapes that no network has: {several(sorted(absurd))}")


def _refuse(path: pathlib.Path, names: list[str]) -> None:
    if names:
        raise UserError(f"{path} holds what is no array of floats: {several(sorted(names), NAMED)}")
