"""Reads named arrays from safetensors and torch.save files, and writes safetensors."""

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
_MOST_DIMENSIONS = 8  # a 3-D convolution has 5; NumPy allows 64
_MOST_VALUES = 1 << 40  # per array, counting axes of size 0 as 1
_ENTRIES = ("model", "state_dict")  # usual keys of the parameters in a checkpoint
# keys of one state dict each, as in DINO and DINOv2
_NETWORKS = ("teacher", "student", "backbone", "dino_loss")
_COUNTER = "num_batches_tracked"  # integers, of batch norms
_DIGEST = "sha256"  # of the arrays, in the metadata of safetensors
# wrapper modules of PyTorch, at any level
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module)\.")


def read(path: pathlib.Path, verify: bool = True, notes: list[str] | None = None) -> dict[str, np.ndarray]:
    """Reads the parameters in a file as float32 arrays by name, without the prefixes of PyTorch wrappers such as
    `module.`.

    Args:
      path: NAME.safetensors, or else a torch.save file with a state dict, either at the top level or under `model` or
        `state_dict`, or with one state dict for each of `teacher`, `student`, `backbone`, `dino_loss`; other entries
        are ignored, and so are the batch counters of batch norms.
      verify: check checksums: this program's digest of the arrays in safetensors, the CRC of each member of a
        torch.save file.
      notes: notes on ignored and on rounded arrays are appended to it.

    Raises:
      UserError: a file that does not exist or is damaged; as `pickles.load`.
      Misfit: entries that are not floating-point arrays; the error names all of them.
    """
    notes = [] if notes is None else notes
    named = _safetensors(path, verify) if path.suffix == ".safetensors" else _torch(path, verify, notes)
    rounded = [name for name, array in named.items() if array.dtype.itemsize > 4]
    if rounded:
        notes.append(f"{len(rounded)} float64 arrays are rounded to float32")
    with np.errstate(over="ignore"):  # overflow becomes inf, which `tables.misfits` reports
        named = {name: array.astype(np.float32, copy=False) for name, array in named.items()}
    bare = {_WRAPPER.sub("", name): array for name, array in named.items()}
    return bare if len(bare) == len(named) else named


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes NAME.safetensors atomically; equal arrays give equal bytes. Raises OSError."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = {"format": "pt", _DIGEST: digests.arrays_digest(contiguous)}
    content = safetensors.numpy.save(contiguous, metadata)
    # safetensors writes the metadata in arbitrary order.
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
        raise UserError(f"{path} is not a safetensors file, or is truncated ({error}); get another copy") from error
    _check_floats(path, [name for name, each in stored.items() if each["dtype"] not in _DTYPES])
    _check_shapes(path, {name: each["shape"] for name, each in stored.items()})
    arrays = {
        name: np.frombuffer(each["data"], _DTYPES[each["dtype"]]).reshape(each["shape"])
        for name, each in stored.items()
    }
    written = _metadata(content).get(_DIGEST)
    if verify and written is not None and written != digests.arrays_digest(arrays):
        raise UserError(f"{path} is damaged: its arrays do not match their digest; get another copy")
    return arrays


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a valid safetensors file."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}


def _torch(path: pathlib.Path, verify: bool, notes: list[str]) -> dict[str, np.ndarray]:
    held: Any = pickles.load(path, verify)
    import torch

    if not isinstance(held, dict):
        raise UserError(
            f"expected a dictionary of parameters in {path}, got {type(held).__name__}; save the model's state_dict"
        )
    entry = next((name for name in _ENTRIES if isinstance(held.get(name), dict)), None)
    if entry is not None:
        notes += _ignored(held, {entry})
        held = held[entry]
    networks = {name: held[name] for name in _NETWORKS if isinstance(held.get(name), dict)}
    if networks:
        notes += _ignored(held, networks.keys())
        held = dict(_flat(networks))
    held = {name: value for name, value in held.items() if not str(name).endswith(_COUNTER)}
    _check_floats(
        path, [str(k) for k, v in held.items() if not (isinstance(v, torch.Tensor) and v.is_floating_point())]
    )
    _check_shapes(path, {str(name): tensor.shape for name, tensor in held.items()})
    # A stride of 0 makes a huge array out of one stored number; a copy would exhaust the memory.
    spread = [str(k) for k, v in held.items() if v.numel() * v.element_size() > v.untyped_storage().nbytes()]
    if spread:
        raise Misfit(f"{path} has arrays that are larger than their stored data: {every(sorted(spread))}")
    wide = lambda tensor: tensor if tensor.dtype == torch.float64 else tensor.float()  # noqa: E731
    return {str(name): wide(tensor.detach()).numpy() for name, tensor in held.items()}


def _ignored(held: dict, used: Collection[str]) -> list[str]:
    """A note on entries with arrays other than the `used` ones, such as other networks and optimizers."""
    import torch

    def holds_arrays(value: Any, depth: int = 0) -> bool:
        inside = value.values() if isinstance(value, dict) and depth < _MOST_DIMENSIONS else ()
        return isinstance(value, torch.Tensor) or any(holds_arrays(each, depth + 1) for each in inside)

    others = [f"{key}{'.*' if isinstance(value, dict) else ''}" for key, value in held.items()
              if key not in used and holds_arrays(value)]  # fmt: skip
    return [f"imported {every(used)} of the file; ignored: {several(sorted(others), 12)}"] if others else []


def _flat(held: dict, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The leaves of nested dictionaries, by dotted names."""
    for key, value in held.items():
        if isinstance(value, dict) and depth < _MOST_DIMENSIONS:
            yield from _flat(value, f"{prefix}{key}.", depth + 1)
        else:
            yield f"{prefix}{key}", value


def _check_shapes(path: pathlib.Path, shapes: dict[str, Sequence[int]]) -> None:
    absurd = [
        f"{name} {list(shape[:_MOST_DIMENSIONS])}"
        + (f" ..., {len(shape)} dimensions" if len(shape) > _MOST_DIMENSIONS else "")
        for name, shape in shapes.items()
        if len(shape) > _MOST_DIMENSIONS or math.prod(side or 1 for side in shape) > _MOST_VALUES
    ]
    if absurd:
        raise UserError(f"{path} has arrays with impossible shapes: {several(sorted(absurd))}; get another copy")


def _check_floats(path: pathlib.Path, names: list[str]) -> None:
    if names:
        raise Misfit(f"{path} has entries that are not floating-point arrays: {every(sorted(names))}")
