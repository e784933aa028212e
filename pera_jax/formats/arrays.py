"""Named arrays in a file: safetensors, or a dictionary that torch.save has written."""

import json
import math
import pathlib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from pera_jax.common import digests, files
from pera_jax.common.errors import Misfit, UserError
from pera_jax.common.text import every, several
from pera_jax.formats import pickles

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_MOST_DIMENSIONS = 8  # a convolution over space and time has 5; NumPy takes 64
_MOST_VALUES = 1 << 40  # of one array, also of one that holds none because a side is 0
_ENTRIES = ("model", "state_dict")  # where training programs keep the parameters beside other things
_NETWORKS = ("teacher", "student", "backbone")  # entries that hold a dictionary each, as DINO's and DINOv2's
_DIGEST = "sha256"  # over the arrays, in the metadata of safetensors
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module)\.")  # of PyTorch, around any part


def read(path: pathlib.Path, verify: bool = True, told: list[str] | None = None) -> dict[str, np.ndarray]:
    """The parameters in a file as float32, by name, without the names of PyTorch's wrappers, as `module.`.

    Args:
      path: NAME.safetensors, else a file of torch.save: with a dictionary of arrays, by itself or as its entry `model`
        or `state_dict`; or with a dictionary for each of `teacher`, `student`, `backbone`, beside which other entries are
        passed over.
      verify: check the checksums that the file has: this program's over all arrays in safetensors, each member's in a file
        of torch.save.
      told: gets a line for arrays that are passed over, and one for those that are rounded.

    Raises:
      UserError: no such file, or damaged; entries that are no arrays of floats, all of which are named; as `pickles.load`.
    """
    told = [] if told is None else told
    named = _safetensors(path, verify) if path.suffix == ".safetensors" else _torch(path, verify, told)
    rounded = [name for name, array in named.items() if array.dtype.itemsize > 4]
    if rounded:
        told.append(f"{len(rounded)} arrays of float64 are rounded to float32")
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which the reader refuses
        named = {name: array.astype(np.float32, copy=False) for name, array in named.items()}
    bare = {_WRAPPER.sub("", name): array for name, array in named.items()}
    return bare if len(bare) == len(named) else named


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes NAME.safetensors, whole or not at all: the same bytes for the same arrays. Raises OSError."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"format": "pt", _DIGEST: digests.of_named(contiguous)}
    content = safetensors.numpy.save(contiguous, metadata)
    # It writes the metadata in any order.
    other, one = (_compact(dict(items)) for items in (reversed(metadata.items()), metadata.items()))
    files.write(path, content.replace(other, one, 1))


def _compact(metadata: dict[str, str]) -> bytes:
    return json.dumps(metadata, separators=(",", ":")).encode("ascii")


def _safetensors(path: pathlib.Path, verify: bool) -> dict[str, np.ndarray]:
    try:
        content = path.read_bytes()
        stored = dict(safetensors.deserialize(content))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is no safetensors file, or is cut off ({error})") from error
    _refuse(path, [name for name, each in stored.items() if each["dtype"] not in _DTYPES])
    _refuse_shapes(path, {name: each["shape"] for name, each in stored.items()})
    arrays = {
        name: np.frombuffer(each["data"], _DTYPES[each["dtype"]]).reshape(each["shape"]) for name, each in stored.items()
    }
    written = _metadata(content).get(_DIGEST)
    if verify and written is not None and written != digests.of_named(arrays):
        raise UserError(f"{path} is damaged: it does not hold the arrays that were written; take another copy of it")
    return arrays


def _metadata(content: bytes) -> dict[str, str]:
    """Of a file that is known to be one of safetensors."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}


def _torch(path: pathlib.Path, verify: bool, told: list[str]) -> dict[str, np.ndarray]:
    held: Any = pickles.load(path, verify)
    import torch

    if not isinstance(held, dict):
        raise UserError(f"{path} holds no dictionary of parameters but a {type(held).__name__}")
    entry = next((name for name in _ENTRIES if isinstance(held.get(name), dict)), None)
    if entry is not None:
        told += _passed_over(held, {entry})
        held = held[entry]
    networks = {name: held[name] for name in _NETWORKS if isinstance(held.get(name), dict)}
    if networks:
        told += _passed_over(held, networks.keys())
        flat = dict(_flat(networks))
        counters = [k for k, v in flat.items() if isinstance(v, torch.Tensor) and not v.is_floating_point()]  # of batches
        held = {name: value for name, value in flat.items() if name not in counters}
    _refuse(path, [str(k) for k, v in held.items() if not (isinstance(v, torch.Tensor) and v.is_floating_point())])
    _refuse_shapes(path, {str(name): tensor.shape for name, tensor in held.items()})
    # A stride of 0 makes a terabyte of one number, which the first copy would ask of the memory.
    spread = [str(k) for k, v in held.items() if v.numel() * v.element_size() > v.untyped_storage().nbytes()]
    if spread:
        raise Misfit(f"{path} holds arrays that are larger than what is stored of them: {every(sorted(spread))}")
    wide = lambda tensor: tensor if tensor.dtype == torch.float64 else tensor.float()  # noqa: E731
    return {str(name): wide(tensor.detach()).numpy() for name, tensor in held.items()}


def _passed_over(held: dict, taken: Collection[str]) -> list[str]:
    """A line on the entries beside the `taken` ones that hold arrays, as other networks and optimisers do."""
    import torch

    def holds_arrays(value: Any, depth: int = 0) -> bool:
        inside = value.values() if isinstance(value, dict) and depth < _MOST_DIMENSIONS else ()
        return isinstance(value, torch.Tensor) or any(holds_arrays(each, depth + 1) for each in inside)

    others = [f"{key}{'.*' if isinstance(value, dict) else ''}" for key, value in held.items()
              if key not in taken and holds_arrays(value)]  # fmt: skip
    return [f"taken is {every(taken)} of the file; passed over: {several(sorted(others), 12)}"] if others else []


def _flat(held: dict, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """What dictionaries in dictionaries hold, by names with dots."""
    for key, value in held.items():
        if isinstance(value, dict) and depth < _MOST_DIMENSIONS:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


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
        raise Misfit(f"{path} holds what is no array of floats: {every(sorted(names))}")
